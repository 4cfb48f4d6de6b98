import torch.nn.functional as F


def attend(self, q, keys, values, mask):
    """Attention of one token. q (H, 1, D), keys and values (H_kv, n, D), mask (H_kv, 1, n),
    True where to attend, or None -> (1, H * D)."""
    raise NotImplementedError
