import torch


def mean_query(q, vectors, variances, lengths) -> torch.Tensor:
    """The paper's score (Section 3.3): the mean query of the sentence being written, times the
    sentence vector. It is linear in the query, so its sum over tokens ranks as the mean does, if
    `query_decay` is 1; a smaller one makes it a weighted mean. One selection per group needs the
    mean over its query heads, too.

    q (H_kv, G, D) of one token, vectors (H_kv, S, D), variances and lengths unused -> (H_kv, S)
    """
    raise NotImplementedError
