"""Attention of several tokens to those before them, in memory that is bounded; and which of
PyTorch's implementations one token uses."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

# For one token on a GPU, the fastest first (of an H200). FlashAttention takes no mask. cuDNN does,
# but it plans anew for each number of keys, and reads a head's keys with one block of threads.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def causal_attention(q, keys, values, block: int = 1024):
    """Each of the last T of n tokens attends to those before it and to itself.

    q (H, T, D), keys and values (H_kv, n, D) -> (H, T, D)
    """
    # Every block of queries reads all keys: that is faster if they are contiguous.
    keys, values = keys.contiguous(), values.contiguous()
    n_tokens, n_earlier = keys.shape[1], keys.shape[1] - q.shape[1]
    if n_earlier == 0:
        return F.scaled_dot_product_attention(
            q[None], keys[None], values[None], is_causal=True, enable_gqa=True)[0]
    # PyTorch's causal mask is for q and keys that begin together. Blocks bound the size of ours.
    out, grouped = [], q.unflatten(0, (len(keys), -1))  # (H_kv, G, T, D)
    for start in range(n_earlier, n_tokens, block):
        end = min(start + block, n_tokens)
        mask = torch.ones(end - start, end, dtype=torch.bool, device=q.device).tril(start)
        part = grouped[:, :, start - n_earlier : end - n_earlier]
        found = F.scaled_dot_product_attention(
            part.flatten(1, 2)[None], keys[None, :, :end], values[None, :, :end],
            attn_mask=mask.repeat(part.shape[1], 1))[0]  # (H_kv, G * T, D)
        out.append(found.unflatten(1, part.shape[1:3]))
    return torch.cat(out, dim=2).flatten(0, 1)
