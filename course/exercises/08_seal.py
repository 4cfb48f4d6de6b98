import torch


def seal(self, length: int):
    """Offload the first `length` tokens of the sentence being written, and make them a sentence
    of the table. Its rows can be selected once they have left the recent window."""
    raise NotImplementedError
