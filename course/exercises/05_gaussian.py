import math

import torch


def gaussian(q, vectors, variances, lengths) -> torch.Tensor:
    """The attention that a token of the sentence receives on average, if its keys are Gaussian.

    For Gaussian keys k with mean µ and covariance σ² I, and a query q divided by √D, the mean of
    exp(q · k) is exp(q · µ + |q|² σ² / 2). In the softmax, a sentence of n keys counts n times. The
    result is divided by n: it is the share of one token, because the budget counts tokens.

    Not in the paper. Expected Attention (arXiv 2510.00636) assumes that the *queries* are Gaussian,
    to decide what to evict. Here the keys are assumed Gaussian instead: this is its dual.

    q (H_kv, G, D) of one token, vectors µ (H_kv, S, D), variances σ² and lengths n (H_kv, S)
    -> (H_kv, S)
    """
    raise NotImplementedError
