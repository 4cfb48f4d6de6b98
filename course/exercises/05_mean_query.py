import torch


def mean_query(q, vectors, variances, lengths) -> torch.Tensor:
    """The paper's score (Section 3.3): the sentence vector times the mean query of the sentence
    being written. This is the part of one token, averaged over the query heads of the group. The
    cache adds up the parts of all tokens: their sum ranks sentences as their mean does.

    q (H_kv, G, D) of one token, vectors (H_kv, S, D), variances and lengths unused -> (H_kv, S)
    """
    raise NotImplementedError
