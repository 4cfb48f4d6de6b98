"""What a cache holds and moves, in bytes, measured on its tensors."""

import torch

HEADINGS = {"slots": "slots", "vectors": "sentence vectors"}
REST = "bookkeeping"  # of all other tensors


class Totals:
    """Rows selected and loaded since the last text, of all heads and layers. Sinks do not count:
    they are selected for every token, and loaded once."""

    def __init__(self, plan, layers):
        self.plan, self.layers = plan, layers
        self.selected = torch.zeros_like(plan.next_slot)
        self.loaded = torch.zeros_like(plan.next_slot)
        self.n_sinks = 0

    def restart(self):
        """After a text. `loaded` begins at minus the sinks that are still to be loaded."""
        self.selected.zero_()
        self.n_sinks = sum(int(layer.ends[:, 0].sum()) for layer in self.layers)
        n_resident = sum(int(layer.n_resident[:, 0].sum()) for layer in self.layers)
        self.loaded.fill_(n_resident - self.n_sinks)

    def add_token(self):
        n_heads = len(self.layers) * self.layers[0].host.heads
        self.selected += n_heads * self.plan.n_select - self.n_sinks
        self.loaded += torch.stack([layer.slot_missing for layer in self.layers]).sum()


def report(cache) -> dict:
    """Bytes that a SentenceKVCache holds, and bytes selected and loaded since its last text, not
    counting sinks. On the host, rows of a mapped file count whether they have been read or not."""
    packings = (layer.packing for layer in cache.layers)
    parts = held_bytes((cache.plan, cache.totals, *cache.layers, *packings))
    selected, loaded = cache.totals.selected.item(), max(cache.totals.loaded.item(), 0)
    row_bytes, host = cache.layers[0].slots[0, 0].nbytes, cache.layers[0].host
    whole_row = 2 * host.packing.dim * host.packing.dtype.itemsize  # of the full cache, not packed
    return {"device_kv_parts": parts, "device_kv_bytes": sum(parts.values()),
            "host_kv_bytes": sum(layer.host.nbytes for layer in cache.layers),
            "full_kv_bytes": cache.num_tokens * len(cache.layers) * host.heads * whole_row,
            "selected_bytes": selected * row_bytes, "loaded_bytes": loaded * row_bytes,
            "hit_rate": 1 - loaded / selected if selected else None}


def held_bytes(objects) -> dict:
    """Bytes of all tensors that are attributes of `objects`, by heading."""
    parts = dict.fromkeys([*HEADINGS.values(), REST], 0)
    for name, value in (item for part in objects for item in vars(part).items()):
        if isinstance(value, torch.Tensor):
            parts[HEADINGS.get(name, REST)] += value.untyped_storage().nbytes()
    return parts
