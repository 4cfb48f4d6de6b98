"""Which slot holds which row: a row that is still selected stays, and only others move."""

import torch

NO_ROW = 2**31 - 1  # the row of an empty slot; greater than any row


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
    ends = starts + selected  # after the selected rows of each place: 0, 4, 10, 13
    free = rows >= ends.gather(-1, places)  # yes, no, yes; also where a slot is empty
    number = free.cumsum(dim=-1, dtype=rows.dtype)  # of a free slot, from 1: 1, -, 2
    # Rows to load of each place and of those before it: 0, 0, 1, 2. The first place that reaches a
    # slot's number has the row for it: places 2, -, 3.
    n_loads = (selected - n_resident).clamp(min=0).cumsum(dim=-1, dtype=rows.dtype)
    place = torch.searchsorted(n_loads, number)
    n_places = selected.shape[-1]
    missing = free & (place < n_places)  # there can be more free slots than rows to load
    place = place.clamp(max=n_places - 1)
    # A place loads its last selected rows. For the last, row ends - 1, number == n_loads.
    row = (ends - n_loads).gather(-1, place) + number - 1  # 9, -, 12
    rows = torch.where(missing, row, rows.masked_fill(free, NO_ROW))
    return rows, torch.where(free, place, places), missing
