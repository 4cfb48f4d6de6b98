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
    sort = torch.ops.sentencekv.sort if torch.compiler.is_compiling() else sort_on_cpu
    return sort(scores)[:, :n]


def sort_on_cpu(scores: torch.Tensor) -> torch.Tensor:
    """(H, S) -> (H, S), the indices of all numbers, the largest first."""
    return torch.from_numpy(np.negative(scores.numpy()).argsort(axis=-1))


# For `torch.compile` it is one operator, whose inside it does not see.
torch.library.define("sentencekv::sort", "(Tensor scores) -> Tensor")
torch.library.impl("sentencekv::sort", "cpu", sort_on_cpu)
torch.library.register_fake(
    "sentencekv::sort", lambda scores: torch.empty_like(scores, dtype=torch.long))
