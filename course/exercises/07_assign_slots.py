import torch

from cache import NO_ROW


def assign_slots(rows, sentences, starts, n_resident, selected) -> tuple:
    """The row that each slot holds next, that row's sentence, and whether the row must be loaded.

    The slot of a row that is still selected keeps it. The other slots are free, and the i-th free
    slot takes the i-th row to load. rows, sentences (H_kv, B) of the slots. starts, n_resident and
    selected (H_kv, S) of the sentences, counted in rows -> rows, sentences, missing (H_kv, B)

    >>> assign_slots(rows=torch.tensor([[5, 8, 4]]), sentences=torch.tensor([[0, 1, 0]]),
    ...     starts=torch.tensor([[4, 8, 12]]), n_resident=torch.tensor([[2, 1, 0]]),
    ...     selected=torch.tensor([[0, 2, 1]]))  # rows 8, 9 and 12
    (tensor([[ 9,  8, 12]]), tensor([[1, 1, 2]]), tensor([[ True, False,  True]]))
    """
    raise NotImplementedError
