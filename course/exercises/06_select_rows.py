import math

import torch

from sentencekv import MOST


def select_rows(scores, lengths, row_budget, most: int = MOST) -> torch.Tensor:
    """How many rows to select of each sentence: all of the best ones, until the budget is full, and
    the first rows of the last one (Section 3.3). Only S scores are compared, and no tokens.

    scores (H_kv, S), lengths (H_kv, S) in rows, row_budget (H_kv, 1), at most `most` -> (H_kv, S)

    >>> select_rows(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([[3, 3, 2]]), torch.tensor([[4]]))
    tensor([[0, 3, 1]])
    """
    raise NotImplementedError
