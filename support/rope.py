"""RoPE for a longer context than a model was first trained on.

`scaling` is `rope_scaling` of a model's config: its `rope_type` is "linear", "llama3" or "yarn".
"""

import math

import torch


def scaled(frequency: torch.Tensor, scaling: dict) -> torch.Tensor:
    """The frequencies of each pair of channels (D/2,) in radians per position, made slower.

    A pair that becomes `factor` times slower is as if positions were divided by `factor`. "linear"
    does this to all pairs. The others do it to the slow ones only: `kept` goes from 0 for these to
    1 for pairs that stay as they are.
    """
    if scaling["rope_type"] == "linear":
        kept = torch.zeros_like(frequency)
    else:
        kept = (llama3_kept if scaling["rope_type"] == "llama3" else yarn_kept)(frequency, scaling)
    return frequency * (kept + (1 - kept) / scaling["factor"])


def llama3_kept(frequency: torch.Tensor, scaling: dict) -> torch.Tensor:
    """Llama 3.1: 0 for less than `low` turns in the first context, 1 for more than `high`."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    return ((turns - low) / (high - low)).clamp(0, 1)


def yarn_kept(frequency: torch.Tensor, scaling: dict) -> torch.Tensor:
    """YaRN (arXiv 2309.00071): a ramp over the pairs' numbers, from the one that makes `beta_fast`
    turns in the first context to the one that makes `beta_slow`."""
    original, n_pairs = scaling["original_max_position_embeddings"], len(frequency)

    def pair_of(turns: float) -> float:  # frequency = theta ** (-pair / n_pairs)
        return n_pairs * math.log(original / (2 * math.pi * turns), scaling["rope_theta"])

    first, last = (pair_of(scaling.get(name, default))
                   for name, default in (("beta_fast", 32), ("beta_slow", 1)))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * n_pairs - 1)  # as the authors have it
    pairs = torch.arange(n_pairs, device=frequency.device, dtype=torch.float32)
    return 1 - ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)


def attention_scale(scaling: dict) -> float:
    """YaRN's factor of cosines and sines: q · k grows by its square. Otherwise 1."""
    if scaling["rope_type"] != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    growth = math.log(scaling["factor"]) / 10
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return (scaling["mscale"] * growth + 1) / (scaling["mscale_all_dim"] * growth + 1)
    return growth + 1
