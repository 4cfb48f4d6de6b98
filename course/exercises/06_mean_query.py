import torch


def mean_query(q, vectors, variances, lengths) -> torch.Tensor:
    """The paper's score (Section 4.2): the sentence vector times the mean query of the open
    sentence. This is the score for one token, with the mean query of the group's heads. The cache
    adds up those of all tokens: with a decay of 1, the sums rank sentences as the means do.

    q (H_kv, G, D) of one token, vectors (H_kv, S, D), variances and lengths unused -> (H_kv, S)
    """
    raise NotImplementedError
