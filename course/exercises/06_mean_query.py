import torch


def mean_query(q, vectors, variances, lengths) -> torch.Tensor:
    """The paper's score (Section 4.2) for one token: the sentence vector times the mean query of
    the group's heads. The paper takes the mean over the tokens of the open sentence. The cache adds
    up their scores: with a decay of 1, the sums rank sentences as the means do.

    q (H_kv, G, D) of one token, vectors (H_kv, S, D), variances and lengths unused -> (H_kv, S)
    """
    raise NotImplementedError
