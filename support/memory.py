"""How many bytes objects hold, measured on their tensors."""

import torch


def held_bytes(objects, names: dict) -> dict:
    """Bytes of all tensors that are attributes of `objects`, by name: `names` maps an attribute to
    a heading; all others are "bookkeeping"."""
    parts = dict.fromkeys([*names.values(), "bookkeeping"], 0)
    for name, value in (item for part in objects for item in vars(part).items()):
        if isinstance(value, torch.Tensor):
            parts[names.get(name, "bookkeeping")] += value.untyped_storage().nbytes()
    return parts
