import torch


def seal(self, length: int):
    """Make the first `length` rows of the open sentence a sentence of the table, and offload
    them."""
    raise NotImplementedError
