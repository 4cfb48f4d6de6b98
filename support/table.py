"""Tables that grow: tensors (H_kv, S, ...) of one capacity S, attributes of an object."""

import torch

BLOCK = 64  # the capacity is a multiple of it: a GPU wants aligned rows


def room_for(n: int) -> int:
    """The capacity of a table with `n` places in use: one more block is free, so that it seldom
    grows."""
    return (n // BLOCK + 2) * BLOCK


def make_room(layers, n_places: int, shrink: bool = False):
    """Have the tables `layer.TABLE` of all layers hold `n_places`. They grow if that is needed, and
    give back memory if `shrink`."""
    capacity, wanted = layers[0].vectors.shape[1], room_for(n_places)
    if n_places > capacity or shrink and wanted < capacity:
        for layer in layers:
            resize(layer, layer.TABLE, wanted)


@torch.inference_mode(False)  # a tensor made in inference mode cannot be changed outside it
def resize(owner, names, capacity: int):
    """Replace the tables `names` of an object by others of this capacity, with the same content."""
    for name in names:
        before = getattr(owner, name)
        n = min(capacity, before.shape[1])
        after = before.new_zeros(len(before), capacity, *before.shape[2:])
        after[:, :n] = before[:, :n]
        setattr(owner, name, after)
