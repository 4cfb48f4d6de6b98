import torch
import torch.nn.functional as F


def sentence_bounds(marked: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The row at which each sentence begins. It ends where the next one begins.

    Sentences of which a head keeps nothing go to the end of its list, so that the table can be cut
    there. Hence index s can mean different sentences in two heads.

    marked (H_kv, N) from `order_rows`, ends (S,), the position after each sentence -> (H_kv, S + 1)

    Sentences end at 4, 7 and 10. Row 0 is a secondary sink, rows 1 and 2 are of the first sentence,
    none is of the second, rows 3 and 4 are of the third:

    >>> sentence_bounds(torch.tensor([[-1, 0, 1, 8, 9]]), torch.tensor([4, 7, 10])).tolist()
    [[1, 3, 5, 5]]
    """
    raise NotImplementedError
