"""What a saved document holds: the type and the shape of each tensor, and the range of its values.

Whoever changes a document can change its checksums, too, so all that the program relies on is
checked here. What is left to them is what no check can know: other text with its tokens, and other
finite keys, values and vectors.
"""

import math

import torch

from support.bits import LEAST_DEVIATION, SCALE_BYTES
from support.mapped import SUMS

STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # dtype -> as safetensors has it
SAVED_TABLE = ("vectors", "variances", "lengths", "starts", "ends")  # of all sentences
OF_ANCHORS = ("vectors", "variances")  # `support.reuse`: the other layers have none
CHANNELS = ("mean", "deviation")  # of a `support.bits.Packing`
MOST_SHOWN = 120  # characters
MOST_TEXT = 2**26  # bytes of a text: a token has a few


def shown(value) -> str:
    """A value of a strange file in few characters, in one line."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(value).split()))
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


def check_header(found: dict, ranges: dict, model_config, identity: dict):
    """Compare the tensors of a file, name -> (type, shape), with those that a document of the model
    has. The numbers of tokens, sentences, rows and places differ from file to file. `ranges` say
    where the tensors are in the file, (begin, end). ValueError names what is absent, additional, or
    of another type or shape."""
    def size(name: str, axis: int = 0) -> int:
        shape = found.get(name, ("", ()))[1]
        return shape[axis] if axis < len(shape) else 0

    n_tokens, n_spans, n_text, n_rows = map(size, ("ids", "spans", "text", "0.rows"))
    n_places = size("0.starts", axis=1)
    expected = {"num_tokens": ("I64", ()), "ids": ("I64", (n_tokens,)),
                "spans": ("I64", (n_spans, 2)), "text": ("U8", (n_text,)),
                SUMS: ("I64", (model_config.kv_shape[0] + 1,)),
                **layer_tensors(model_config.kv_shape, identity, n_rows, n_places)}
    refuse([name for name in {**expected, **found} if found.get(name) != expected.get(name)])
    refuse([name for name, good in {
        "ids": n_tokens <= model_config.max_position_embeddings,
        "spans": 0 < n_spans <= n_tokens, "text": 0 < n_text <= MOST_TEXT,
        "0.rows": 0 < n_rows <= n_tokens, "0.starts": 1 < n_places <= n_spans + 1,
    }.items() if not good])
    # A tensor begins at a multiple of the size of its numbers, which is (end - begin) / numel.
    refuse([name for name, (begin, end) in ranges.items()
            if end > begin and begin * math.prod(found[name][1]) % (end - begin)])


def layer_tensors(kv_shape: tuple, identity: dict, n_rows: int, n_places: int) -> dict:
    """Name -> (type, shape) of the tensors of all layers."""
    (layers, heads, dim), table = kv_shape, (kv_shape[1], n_places)
    kept, n_channels, width = STORED[identity["dtype"]], 0, dim  # nothing is packed
    if identity["kv_bits"] == "8":
        kept, n_channels, width = "I8", dim, dim + SCALE_BYTES
    of_layer = {"rows": (kept, (n_rows, heads, 2, width)), "positions": ("I32", (heads, n_rows)),
                "vectors": (kept, (*table, width)), "variances": ("F32", table),
                **dict.fromkeys(CHANNELS, ("F32", (heads, 1, 2, n_channels))),
                "lengths": ("F32", table), "starts": ("I32", table), "ends": ("I32", table)}
    return {f"{i}.{name}": tensor for i in range(layers) for name, tensor in of_layer.items()
            if i % int(identity["reuse_layers"]) == 0 or name not in OF_ANCHORS}


def refuse(names: list):
    """ValueError if there is a name."""
    if names:
        more = f" and {len(names) - 4} others" if len(names) > 4 else ""
        raise ValueError(f"wrong {', '.join(map(ascii, names[:4]))}{more}")


def check_values(tensors: dict, model_config, identity: dict):
    """Compare with their ranges the values of all tensors but the rows. Their types and shapes are
    right. ValueError names those that are wrong."""
    bytes(tensors["text"].numpy()).decode()
    ids, spans, n_tokens = tensors["ids"], tensors["spans"], len(tensors["ids"])
    refuse([name for name, good in {
        "num_tokens": tensors["num_tokens"] == n_tokens,
        "ids": within(ids, 0, model_config.vocab_size - 1),
        "spans": tile(*spans.T, n_tokens) and (spans[:, 0] < spans[:, 1]).all(),
    }.items() if not good])
    n_first = min(int(identity["sink_tokens"]), n_tokens)
    for i in range(model_config.kv_shape[0]):
        layer = {name: tensors[f"{i}.{name}"] for name in (*SAVED_TABLE, *CHANNELS, "positions")
                 if f"{i}.{name}" in tensors}
        good = check_layer(layer, n_tokens, n_first, int(identity["secondary_sinks"]))
        refuse([f"{i}.{name}" for name in good if not good[name]])


def check_layer(layer: dict, n_tokens: int, n_first: int, n_secondary: int) -> dict:
    """Whether the values of each tensor of a layer are in their ranges. A head has `n_first` first
    sinks, and `n_secondary` secondary ones at most."""
    n_rows, sinks = layer["positions"].shape[1], layer["ends"][:, 0]  # place 0 is all sinks
    good = {"ends": within(sinks, n_first, n_first + n_secondary)
            and tile(layer["starts"], layer["ends"], n_rows),
            "mean": layer["mean"].isfinite().all(),
            "deviation": within(layer["deviation"], LEAST_DEVIATION / 2,
                                torch.finfo(layer["deviation"].dtype).max),
            "lengths": within(layer["lengths"], 0, n_rows)}
    if "vectors" in layer:
        good["vectors"] = floats(layer["vectors"]).isfinite().all()
        good["variances"] = within(layer["variances"], 0, torch.finfo(torch.float32).max)
    if good["ends"]:
        good["positions"] = in_order(layer["positions"], sinks - n_first, n_tokens)
    return good


def floats(vectors: torch.Tensor) -> torch.Tensor:
    """What of a table of vectors can be NaN: the scales of packed ones, or all."""
    if vectors.dtype != torch.int8:
        return vectors
    return vectors[..., -SCALE_BYTES:].clone().view(torch.bfloat16)


def within(tensor: torch.Tensor, least, most) -> bool:
    """Whether all values are in the range. NaN is not."""
    return bool(((tensor >= least) & (tensor <= most)).all())


def tile(starts: torch.Tensor, ends: torch.Tensor, n: int) -> bool:
    """Whether the ranges (..., S) follow one another from 0 to n without a gap. They may be empty.
    Numbers are compared, not subtracted: a difference can overflow.

    >>> tile(torch.tensor([0, 2, 2]), torch.tensor([2, 2, 5]), 5)
    True
    """
    return bool((starts[..., 0] == 0).all() and (ends[..., -1] == n).all()
                and (starts[..., 1:] == ends[..., :-1]).all() and (starts <= ends).all())


def in_order(positions: torch.Tensor, n_secondary: torch.Tensor, n_tokens: int) -> bool:
    """Whether the rows of each head are of different tokens: its secondary sinks (H_kv,) as they
    are read, then all others. positions (H_kv, N)

    >>> in_order(torch.tensor([[3, 7, 0, 1, 8]]), torch.tensor([2]), 9)
    True
    """
    if not within(positions, 0, n_tokens - 1):
        return False
    rises = positions[:, 1:] > positions[:, :-1]
    second_run = torch.arange(1, positions.shape[1]) == n_secondary[:, None]  # where it begins
    seen = torch.zeros(len(positions), n_tokens, dtype=torch.bool)
    seen.scatter_(1, positions.long(), True)
    return bool((rises | second_run).all()) and int(seen.sum()) == positions.numel()
