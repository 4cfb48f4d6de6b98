import math

import torch
import torch.nn.functional as F


def token_importance(q: torch.Tensor, k: torch.Tensor, pool: int = 7) -> torch.Tensor:
    """The attention that the prompt's last W queries pay to each earlier token.

    SnapKV's score (arXiv 2404.14469): summed over the window, averaged over the group, and
    max-pooled, so that the neighbours of an important token are kept as well.

    q (H, W, D) of the last W tokens, k (H_kv, T, D) -> (H_kv, T - W)
    """
    raise NotImplementedError
