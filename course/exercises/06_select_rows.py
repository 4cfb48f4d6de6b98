import math

import torch

from support.settings import MAX_COUNT


def select_rows(scores, available, budget, most_sentences: int = MAX_COUNT) -> torch.Tensor:
    """How many rows to select of each sentence: all of the best ones, until the budget is full, and
    the first rows of the last one (Section 3.3). Only S scores are compared, and no tokens.

    scores (H_kv, S); available (H_kv, S), the rows that may be selected; budget, rows of a head, a
    number or a tensor with one; at most `most_sentences` are selected -> (H_kv, S)

    The budget is 4 rows. The best sentence has 3. The next best has 2, and one of them fits:

    >>> select_rows(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([[3, 3, 2]]), budget=4)
    tensor([[0, 3, 1]])
    """
    raise NotImplementedError
