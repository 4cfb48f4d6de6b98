"""RoPE's frequencies for a longer context than a model was first trained on."""

import math

import torch


def scaled(frequency: torch.Tensor, scaling: dict) -> torch.Tensor:
    """Llama 3.1's frequencies: frequency (D/2,) in radians per position, and `rope_scaling` of the
    model's config -> (D/2,)

    A pair of channels that makes fewer than `low` turns in the first context becomes `factor` times
    slower: this is the same as dividing positions by `factor`. A pair of more than `high` turns
    stays. Between the two, `blend` goes from 0 to 1.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (blend + (1 - blend) / scaling["factor"])
