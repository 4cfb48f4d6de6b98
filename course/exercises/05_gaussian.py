import math

import torch


def gaussian(q, vectors, variances, lengths) -> torch.Tensor:
    """The attention that a token of the sentence receives on average, if its keys are Gaussian.

    For Gaussian keys k with mean µ and covariance σ² I, and x = q · k / √D, the mean of exp(x) is
    exp(q · µ / √D + |q|² σ² / 2D). In the softmax over all sentences, one of n keys counts n times.
    Its share is divided by n, because the budget counts tokens, and summed over the G query heads.

    Not in the paper. Expected Attention (arXiv 2510.00636) assumes that the *queries* are Gaussian,
    to decide what to evict. Here the keys are assumed Gaussian instead: this is its dual.

    q (H_kv, G, D) of one token, vectors µ (H_kv, S, D), variances σ² and lengths n (H_kv, S)
    -> (H_kv, S)
    """
    raise NotImplementedError
