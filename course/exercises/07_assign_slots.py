import torch

from cache import NO_ROW


def assign_slots(rows, places, starts, n_resident, selected) -> tuple:
    """The row that each slot holds next, that row's place in the table, and whether the row must be
    loaded. A slot whose row is still selected keeps it. The other slots are free, and the i-th free
    slot takes the i-th row to load.

    rows, places (H_kv, B) of the slots; starts, n_resident and selected (H_kv, S) of the places,
    the last two in rows -> rows, places, missing (H_kv, B)

    Rows 4 and 5 of place 0 and row 8 of place 1 are in slots. Rows 8, 9 and 12 are selected:

        slot                     0    1    2
        its row                  5    8    4
        free?                  yes   no  yes      rows 5 and 4 are not selected any more
        number of a free slot    1         2
        rows to load             9        12      the first of place 1, the second of place 2

    >>> assign_slots(rows=torch.tensor([[5, 8, 4]]), places=torch.tensor([[0, 1, 0]]),
    ...     starts=torch.tensor([[4, 8, 12]]), n_resident=torch.tensor([[2, 1, 0]]),
    ...     selected=torch.tensor([[0, 2, 1]]))
    (tensor([[ 9,  8, 12]]), tensor([[1, 1, 2]]), tensor([[ True, False,  True]]))
    """
    raise NotImplementedError
