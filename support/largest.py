"""The largest numbers of each row, in order. On a CPU, NumPy sorts them several times faster."""

import numpy as np
import torch


def largest(scores: torch.Tensor, n: int) -> torch.Tensor:
    """Indices of the n largest numbers of each row, the largest first: float32 (H, S) -> (H, n)

    >>> largest(torch.tensor([[0.1, 0.9, 0.5]]), 2)
    tensor([[1, 2]])
    """
    if scores.device.type != "cpu":
        return scores.topk(n, dim=-1).indices
    find = torch.ops.sentencekv.largest if torch.compiler.is_compiling() else largest_on_cpu
    return find(scores, n)


def largest_on_cpu(scores: torch.Tensor, n: int) -> torch.Tensor:
    negative = np.negative(scores.numpy())
    if n <= scores.shape[1] <= 2 * n:  # to sort all is faster than to find the best half first
        return torch.from_numpy(np.ascontiguousarray(negative.argsort(axis=-1)[:, :n]))
    best = np.argpartition(negative, n - 1, axis=-1)[:, :n]  # in any order
    order = np.take_along_axis(negative, best, axis=-1).argsort(axis=-1)
    return torch.from_numpy(np.take_along_axis(best, order, axis=-1))


# For `torch.compile` it is one operator, whose inside it does not see.
torch.library.define("sentencekv::largest", "(Tensor scores, SymInt n) -> Tensor")
torch.library.impl("sentencekv::largest", "cpu", largest_on_cpu)
torch.library.register_fake("sentencekv::largest", lambda scores, n: scores.new_empty(
    len(scores), n, dtype=torch.long))
