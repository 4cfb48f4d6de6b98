import torch
import torch.nn.functional as F


def sentence_vectors(keys: torch.Tensor, bounds: torch.Tensor) -> tuple:
    """The semantic vector of each sentence: the mean of its kept keys, after RoPE (Section 4.1).

    Also returns its variance (not in the paper): the squared distance of a key from that mean,
    averaged over keys and channels. An empty sentence gets zeros.

    keys (H_kv, N, D), bounds (H_kv, S + 1) -> (H_kv, S, D) in the keys' dtype, (H_kv, S) in float32

    >>> sentence_vectors(torch.tensor([[[1.0, 0.0], [3.0, 0.0]]]), torch.tensor([[0, 2]]))
    (tensor([[[2., 0.]]]), tensor([[0.5000]]))
    """
    raise NotImplementedError
