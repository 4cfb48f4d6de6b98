import math

import torch


def gaussian(q, vectors, variances, lengths) -> torch.Tensor:
    """The attention that a token of the sentence receives on average, among the sentences, if keys
    are Gaussian. Not in the paper: Expected Attention (arXiv 2510.00636) has Gaussian queries.

    The share of a key is proportional to exp x, x = q · k / √D. A normal x of mean m and variance
    s² has E[exp x] = exp(m + s² / 2). Here m = q · µ / √D, and s² = |q|² σ² / D if all channels
    have variance σ². The share of n keys is divided by n, because the budget counts tokens.

    q (H_kv, G, D), vectors µ (H_kv, S, D), variances σ² and lengths n (H_kv, S) -> (H_kv, S)
    """
    raise NotImplementedError
