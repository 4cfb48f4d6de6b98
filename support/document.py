"""Saved documents: a text from a file, and what a cache kept of it, as one safetensors file.

The file holds, for each layer, the rows of the host with their positions and what the device knows
of the sentences; and the text, its tokens and its sentences. Its metadata say which model and which
settings made it. Whoever saves and loads gives an `identity`, which must be the same for both.
"""

import json
import math
import mmap
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.table import make_room

FORMAT = "sentencekv document 3"
SAME = ("keep_factor", "sink_tokens", "secondary_sinks", "secondary_ratio", "sentence_limit")
TABLE = ("vectors", "variances", "lengths", "starts", "ends")  # of a layer: all sentences


@dataclass
class Document:
    text: str = ""
    ids: list[int] = field(default_factory=list)  # the prompt up to the end of the text
    spans: list = field(default_factory=list)  # their sentences, (start, end)
    now: datetime | None = None  # when it was read: some chat templates print the date
    kept: dict | None = None  # of a file: the tensors of `snapshot`
    release: Callable[[int], None] | None = None  # gives back the memory of a layer's rows

    def rest(self, ids: list[int]) -> list[int]:
        """The tokens of a prompt that begins with the document, without those of the document."""
        n = len(self.ids)
        if ids[:n] != self.ids:
            raise ValueError("the prompt does not begin with the tokens of the document")
        return ids[n:]


def read_text(path: str | Path) -> str:
    """The text of a file, or of standard input for "-". ValueError if it is not UTF-8 or blank."""
    name = "standard input" if path == "-" else path
    if path == "-" and sys.stdin is None:
        raise ValueError("standard input is closed")
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: byte {error.start} is wrong") from None
    except OSError as error:
        raise ValueError(f"cannot read {name}: {error.strerror}") from None
    if not text.strip():
        raise ValueError(f"{name} is empty")
    return text.removesuffix("\n").removesuffix("\r")  # an editor's last newline


def identity_of(fingerprint: str, config, dtype: torch.dtype) -> dict:
    """What must be the same where a document is saved and where it is loaded, as strings: the
    weights, by their `fingerprint`, their dtype, and the settings that decide what is kept."""
    return {"format": FORMAT, "model": fingerprint, "dtype": str(dtype).removeprefix("torch."),
            **{name: str(getattr(config, name)) for name in SAME}}


class SavedDocument:
    """The document of --load, and what --save needs to keep one: `identity` and `document` are None
    where they are not asked for. `fingerprint()` is computed only if it is needed."""

    def __init__(self, args, fingerprint, config, model_config, device, dtype):
        self.path, self.protected_tokens = args.save, config.protected_tokens
        self.identity = self.document = None
        if args.save or args.load:
            self.identity = identity_of(fingerprint(), config, dtype)
        if args.load:
            self.document = load_document(args.load, self.identity, self.protected_tokens,
                                          model_config.kv_shape, device)

    def save(self, document: Document, cache):
        """If --save asks for it. Nothing may have been read or written after the document."""
        if self.path:
            save_document(self.path, document, snapshot(cache), self.identity,
                          self.protected_tokens)


def snapshot(cache) -> dict:
    """What a cache keeps of its first text, in tensors that are not copied. Nothing may have been
    read or written since."""
    plan = cache.plan
    assert cache.first_text == (plan.num_tokens, plan.n_places) and plan.n_rows == plan.open_row
    tensors = {"num_tokens": torch.tensor(plan.num_tokens)}
    for i, layer in enumerate(cache.layers):
        tensors |= {f"{i}.{name}": getattr(layer, name)[:, : plan.n_places] for name in TABLE}
        tensors[f"{i}.rows"] = layer.host.first
        if layer.host.positions is not None:
            tensors[f"{i}.positions"] = layer.host.positions
    return tensors


def restore(cache, tensors: dict, release=None):
    """Have an empty cache go on from a snapshot as if it had just read that text. The settings must
    be those of the snapshot, but for budget, score, decay, and a recent window that is not longer.
    `release(layer)` gives back the memory of mapped rows."""
    plan, n_tokens = cache.plan, tensors["num_tokens"].item()
    n_rows, n_places = len(tensors["0.rows"]), tensors["0.vectors"].shape[1]
    plan.n_dropped = n_tokens - n_rows
    plan.n_first_sinks = min(plan.config.sink_tokens, n_tokens)
    cache.first_text = n_tokens, n_places
    make_room(cache.layers, n_places)
    for i, layer in enumerate(cache.layers):
        layer.host.hold(tensors[f"{i}.rows"], release and partial(release, i))
        layer.host.positions = tensors.get(f"{i}.positions")
        for name in TABLE:
            getattr(layer, name)[:, :n_places] = tensors[f"{i}.{name}"]
    cache.truncate(n_tokens)


def save_document(path: Path, document: Document, kept: dict, identity: dict,
                  protected_tokens: int):
    """Write beside `path` and rename, so that the file is whole, or what it was. ValueError if it
    cannot be written. Of the document, the last `protected_tokens` have all been kept; `kept` is a
    `snapshot` of the cache that has read it."""
    tensors = {name: tensor.contiguous() for name, tensor in kept.items()}
    tensors |= {"ids": torch.tensor(document.ids), "spans": torch.tensor(document.spans),
                "text": torch.frombuffer(bytearray(document.text.encode()), dtype=torch.uint8)}
    metadata = identity | {
        "protected": str(protected_tokens), "now": document.now.isoformat()}
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, part, metadata)
        os.replace(part, path)
    except SafetensorError as error:  # of the disk
        raise ValueError(f"cannot write {path}: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def load_document(path: Path, identity: dict, protected_tokens: int, kv_shape: tuple,
                  device: torch.device) -> Document:
    """The document in a file, for a cache whose rows have `kv_shape` (L, H_kv, D). The rows are
    mapped: they are read from disk when they are asked for. For a GPU they are read and pinned.

    ValueError for a file that is no whole document, or one of another model or other settings.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            check_identity(path, metadata, identity)
            kept = {name: file.get_tensor(name) for name in file.keys() if ".rows" not in name}
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a saved document: {error}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        check_tensors(kept, shapes, kv_shape)
        saved, now = int(metadata["protected"]), datetime.fromisoformat(metadata["now"])
    except (KeyError, ValueError, IndexError, RuntimeError) as error:  # others have changed it
        raise ValueError(f"{path} is not a whole document: {error}") from None
    if protected_tokens > saved:  # the other settings are the same, so it is the recent window
        raise ValueError(f"recent_window is {protected_tokens}, and {path} was saved with"
                         f" {saved} last tokens: at most these")
    ids, spans, text = (kept.pop(name).tolist() for name in ("ids", "spans", "text"))
    rows, release = map_rows(path, getattr(torch, identity["dtype"]), kv_shape[0])
    if device.type == "cuda":
        rows, release = {name: layer.pin_memory() for name, layer in rows.items()}, None
    return Document(bytes(text).decode(), ids, [tuple(span) for span in spans], now, kept | rows,
                    release)


def check_tensors(tensors: dict, shapes: dict, kv_shape: tuple):
    """Compare the shapes of a document's tensors, and what they hold but for the rows. ValueError
    names those that are wrong, KeyError one that is absent."""
    layers, heads, dim = kv_shape
    (n_rows, *_), n_places = shapes["0.rows"], shapes["0.starts"][1]
    n_tokens, spans = tensors["num_tokens"].item(), tensors["spans"].long()
    table = [heads, n_places]
    expected = {"ids": [n_tokens], "spans": [len(spans), 2], "text": [tensors["text"].numel()],
                "num_tokens": []}
    for layer in range(layers):
        expected |= {f"{layer}.{name}": table for name in TABLE}
        expected |= {f"{layer}.vectors": [*table, dim], f"{layer}.rows": [n_rows, heads, 2, dim]}
        if f"{layer}.positions" in shapes:
            expected[f"{layer}.positions"] = [heads, n_rows]
    wrong = [name for name, shape in expected.items() if shapes[name] != shape]
    wrong += shapes.keys() - expected.keys()
    if not 0 < n_rows <= n_tokens:
        wrong.append("rows")
    ends = [0, *spans.flatten()[1::2].tolist()]
    tiles = spans.flatten()[::2].tolist() == ends[:-1] and ends[-1] == n_tokens
    if not tiles or any(a >= b for a, b in pairwise(ends)):
        wrong.append("spans")
    if not wrong:  # the sentences of a head, with its sinks before them, tile its rows
        for layer in range(layers):
            starts, ends = tensors[f"{layer}.starts"], tensors[f"{layer}.ends"]
            bounds = torch.cat((starts[:, :1] * 0, ends), dim=1)
            if (bounds[:, :-1] != starts).any() or (bounds[:, -1] != n_rows).any() or (
                    bounds.diff(dim=-1) < 0).any():
                wrong.append(f"{layer}.starts")
    if wrong:
        raise ValueError(f"wrong {', '.join(wrong)}")


def check_identity(path: Path, found: dict, expected: dict):
    for name, value in expected.items():
        if found.get(name) != value:
            what = f"{name} {found.get(name)}, not {value}"
            what = "another model" if name == "model" else what
            raise ValueError(f"{path} was saved with {what}")


def map_rows(path: Path, dtype: torch.dtype, n_layers: int) -> tuple:
    """The rows of each layer (N, H_kv, 2, D), as mappings of the file, and a function that gives
    the memory of a layer's rows back: they are read again from the file when they are asked for
    again."""
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    rows = {}
    for name in (f"{layer}.rows" for layer in range(n_layers)):
        shape, (begin, _) = header[name]["shape"], header[name]["data_offsets"]
        rows[name] = torch.frombuffer(mapping, dtype=dtype, count=math.prod(shape),
                                      offset=8 + header_size + begin).view(shape)

    def release(layer: int):
        begin, end = (8 + header_size + offset
                      for offset in header[f"{layer}.rows"]["data_offsets"])
        start = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only
        size = end // mmap.PAGESIZE * mmap.PAGESIZE - start
        if size > 0:
            mapping.madvise(mmap.MADV_DONTNEED, start, size)

    return rows, release
