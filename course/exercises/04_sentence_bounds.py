import torch
import torch.nn.functional as F


def sentence_bounds(marked: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The row at which each sentence begins. The sentence ends where the next one begins.

    A sentence of which a head keeps nothing becomes an empty one at the end. So sentence s of one
    head need not be sentence s of another.

    marked (H_kv, N) positions, -1 for those of no sentence, ends (S,) positions after each sentence
    -> (H_kv, S + 1)

    >>> sentence_bounds(torch.tensor([[-1, 0, 1, 8, 9]]), torch.tensor([4, 7, 10])).tolist()
    [[1, 3, 5, 5]]
    """
    raise NotImplementedError
