import torch.nn.functional as F


def attend(self, q, k, v, cache, layer):
    """q (H, 1, D), k and v (H_kv, 1, D) of one token -> (1, H * D)."""
    raise NotImplementedError
