"""What a cache holds and moves, in bytes, measured on its tensors."""

import torch

HEADINGS = {"slots": "slots", "vectors": "sentence vectors"}  # of tensors; of all others:
REST = "bookkeeping"


def report(cache) -> dict:
    """Bytes that a SentenceKVCache holds, and bytes selected and loaded since its last text, not
    counting sinks. On the host, rows of a mapped file count whether they have been read or not."""
    parts = held_bytes((cache, cache.plan, *cache.layers))
    selected, loaded = cache.n_selected.item(), max(cache.plan.n_loaded.item(), 0)
    token_bytes = sum(layer.slots[:, 0].nbytes for layer in cache.layers)
    row_bytes = cache.layers[0].slots[0, 0].nbytes
    return {"device_kv_parts": parts, "device_kv_bytes": sum(parts.values()),
            "host_kv_bytes": sum(layer.host.nbytes for layer in cache.layers),
            "full_kv_bytes": cache.num_tokens * token_bytes,
            "selected_bytes": selected * row_bytes, "loaded_bytes": loaded * row_bytes,
            "hit_rate": 1 - loaded / selected if selected else None}


def held_bytes(objects) -> dict:
    """Bytes of all tensors that are attributes of `objects`, by heading."""
    parts = dict.fromkeys([*HEADINGS.values(), REST], 0)
    for name, value in (item for part in objects for item in vars(part).items()):
        if isinstance(value, torch.Tensor):
            parts[HEADINGS.get(name, REST)] += value.untyped_storage().nbytes()
    return parts
