import math

import torch

from support.settings import MAX_COUNT


def select_rows(scores, available, budget, max_sentences: int = MAX_COUNT) -> torch.Tensor:
    """How many rows to select of each sentence (Section 4.2): all of the best ones, and of the one
    that no longer fits the budget, its first rows. Equal scores come in any order.

    scores (H_kv, S); available (H_kv, S), rows that can be selected; budget in rows of a head, a
    number or a tensor with one; at most `max_sentences` are selected -> (H_kv, S)

    Of a budget of 4 rows, the best sentence takes its 3. Of the next best, one row fits:
    >>> select_rows(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([[3, 3, 2]]), budget=4)
    tensor([[0, 3, 1]])
    """
    raise NotImplementedError
