import math

import torch


def gaussian(q, vectors, variances, lengths) -> torch.Tensor:
    """The attention that a token of the sentence receives on average, among the sentences, if keys
    are Gaussian. Not in the paper. Expected Attention (arXiv 2510.00636) has Gaussian queries.

    A normal x of mean m and variance s² has E[exp x] = exp(m + s² / 2). For x = q · k / √D and keys
    of mean µ and variance σ², m = q · µ / √D and s² = |q|² σ² / D. A sentence of n keys counts n
    times in the softmax. Its share is divided by n, because the budget counts tokens.

    q (H_kv, G, D), vectors µ (H_kv, S, D), variances σ² and lengths n (H_kv, S) -> (H_kv, S)
    """
    raise NotImplementedError
