"""Sentence vectors in 8 bits: what is read of every sentence for every token takes half the memory.

A layer of the cache has `vectors` (H_kv, P, D) and `scales` (H_kv, P, 1). With 16 bits there are no
scales (H_kv, P, 0).
"""

import torch

LARGEST = 127


def no_vectors(heads: int, places: int, dim: int, config, device, dtype) -> tuple:
    """Zeros for `vectors` and `scales`. With 16 bits, vectors have the keys' dtype."""
    kind, n_scales = (torch.int8, 1) if config.vector_bits == 8 else (dtype, 0)
    return (torch.zeros(heads, places, dim, device=device, dtype=kind),
            torch.zeros(heads, places, n_scales, device=device, dtype=dtype))


def write_vectors(layer, places: slice, vectors: torch.Tensor):
    """Give places of a layer's table these vectors (H_kv, S, D)."""
    if layer.vectors.dtype == torch.int8:
        vectors, layer.scales[:, places] = quantized(vectors)
    layer.vectors[:, places] = vectors


def read_vectors(layer) -> torch.Tensor:
    """All vectors of a layer's table (H_kv, P, D), in the keys' dtype."""
    if layer.vectors.dtype == torch.int8:
        return layer.vectors.to(layer.scales.dtype) * layer.scales
    return layer.vectors


def quantized(vectors: torch.Tensor) -> tuple:
    """Vectors (..., D) as whole numbers (..., D), and a scale for each (..., 1). Their product is
    the vector, but for half a scale: the channel that is farthest from 0 becomes 127 or -127.

    >>> quantized(torch.tensor([[127.0, -50.4]]))
    (tensor([[127, -50]], dtype=torch.int8), tensor([[1.]]))
    """
    scales = vectors.abs().amax(dim=-1, keepdim=True) / LARGEST
    numbers = vectors.float() / scales.float().clamp(min=1e-30)  # an empty sentence has zeros
    return numbers.round().clamp(-LARGEST, LARGEST).to(torch.int8), scales
