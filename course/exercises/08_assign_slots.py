import torch

from cache import NO_ROW


def assign_slots(rows, places, starts, n_resident, selected) -> tuple:
    """The row that each slot holds next, that row's place, and whether the row must be loaded.

    A slot whose row is still selected keeps it. The other slots are free, and the i-th free slot
    takes the i-th row to load. All are tensors: rows and places (H_kv, B) of the slots; starts,
    n_resident and selected (H_kv, P) of the places, the last two count rows
    -> rows, places, missing (H_kv, B)

    Rows 4 and 5 of place 1 are in slots, and row 8 of place 2. To select are rows 8 and 9 of place
    2, and row 12 of place 3. So row 8 stays, and rows 9 and 12 are loaded:

        slot            0     1     2
        row before      5     8     4
        free          yes    no   yes
        row after       9     8    12

    >>> assign_slots(rows=torch.tensor([[5, 8, 4]]), places=torch.tensor([[1, 2, 1]]),
    ...     starts=torch.tensor([[0, 4, 8, 12]]), n_resident=torch.tensor([[0, 2, 1, 0]]),
    ...     selected=torch.tensor([[0, 0, 2, 1]]))
    (tensor([[ 9,  8, 12]]), tensor([[2, 2, 3]]), tensor([[ True, False,  True]]))
    """
    raise NotImplementedError
