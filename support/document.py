"""Saved documents: a text from a file, and what a cache kept of it, as one safetensors file.

The file holds, for each layer, the rows of the host with their positions and what the device knows
of the sentences; and the text, its tokens and its sentences. Its metadata say which model and which
settings made it. Whoever saves and loads gives an `identity`, which must be the same for both.

Checksums cover every byte. They are for damage, not against attackers, so they are CRC-32: it finds
each flipped bit, and is fast without special hardware. All are compared when the file is loaded:
the first question attends to every row, so that comparing them later would save no time.
"""

import json
import mmap
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.outputs import replacing
from support.table import make_room

FORMAT = "sentencekv document 4"
SAME = ("keep_factor", "sink_tokens", "secondary_sinks", "secondary_ratio", "sentence_limit")
TABLE = ("vectors", "variances", "lengths", "starts", "ends")  # of a layer: all sentences
SUMS = "checksums"  # a tensor (L + 1): of the rows of each layer, then of all OTHERS
OTHERS = "text and tables"  # and the header: all bytes but rows and checksums
BLOCK = 2**20  # bytes that are read at a time


@dataclass
class Document:
    text: str = ""
    ids: list[int] = field(default_factory=list)  # the prompt up to the end of the text
    spans: list = field(default_factory=list)  # their sentences, (start, end)
    now: datetime | None = None  # when it was read: some chat templates print the date
    kept: dict | None = None  # of a file: the tensors of `snapshot`
    release: Callable[[str], None] | None = None  # gives back the memory of a layer's rows

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
    return {"model": fingerprint, "dtype": str(dtype).removeprefix("torch."),
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
    `release(name)` gives back the memory of mapped rows."""
    plan, n_tokens = cache.plan, tensors["num_tokens"].item()
    n_rows, n_places = len(tensors["0.rows"]), tensors["0.vectors"].shape[1]
    plan.n_dropped = n_tokens - n_rows
    plan.n_first_sinks = min(plan.config.sink_tokens, n_tokens)
    cache.first_text = n_tokens, n_places
    make_room(cache.layers, n_places)
    for i, layer in enumerate(cache.layers):
        layer.host.hold(tensors[f"{i}.rows"], release and partial(release, f"{i}.rows"))
        layer.host.positions = tensors.get(f"{i}.positions")
        for name in TABLE:
            getattr(layer, name)[:, :n_places] = tensors[f"{i}.{name}"]
    cache.truncate(n_tokens)


def save_document(path: Path, document: Document, kept: dict, identity: dict,
                  protected_tokens: int):
    """Write the file whole, or leave what it was. ValueError if it cannot be written. Of the
    document, the last `protected_tokens` have all been kept; `kept` is a
    `snapshot` of the cache that has read it."""
    tensors = {name: tensor.contiguous() for name, tensor in kept.items()}
    tensors |= {"ids": torch.tensor(document.ids), "spans": torch.tensor(document.spans),
                "text": torch.frombuffer(bytearray(document.text.encode()), dtype=torch.uint8)}
    n_layers = sum(name.endswith(".rows") for name in tensors)
    tensors[SUMS] = torch.zeros(n_layers + 1, dtype=torch.long)
    metadata = {"format": FORMAT, **identity, "protected": str(protected_tokens),
                "now": document.now.isoformat()}
    with replacing(path) as part:
        try:
            save_file(tensors, part, metadata)
        except SafetensorError as error:  # of the disk
            raise OSError(f"{error}") from None
        add_checksums(part)


def load_document(path: Path, identity: dict, protected_tokens: int, kv_shape: tuple,
                  device: torch.device) -> Document:
    """The document in a file, for a cache whose rows have `kv_shape` (L, H_kv, D). The rows are
    mapped: they are read from disk when they are asked for. For a GPU they are read and pinned.

    ValueError for a file that is no whole document, or one of another model or other settings.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            check_identity(path, metadata, {"format": FORMAT})
            mapped = MappedFile(path)
            mapped.check([OTHERS])  # first: damage may look like another model
            check_identity(path, metadata, identity)
            mapped.check(mapped.layers)
            kept = {name: file.get_tensor(name) for name in mapped.places if ".rows" not in name}
            shapes = {name: file.get_slice(name).get_shape() for name in mapped.places}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a saved document: {error}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        check_tensors(kept, shapes, kv_shape)
        rows = mapped.rows(getattr(torch, identity["dtype"]), shapes)
        saved, now = int(metadata["protected"]), datetime.fromisoformat(metadata["now"])
    except (KeyError, ValueError, IndexError, RuntimeError) as error:  # others have changed it
        raise ValueError(f"{path} is not a whole document: {error}") from None
    if protected_tokens > saved:  # the other settings are the same, so it is the recent window
        raise ValueError(f"recent_window is {protected_tokens}, and {path} was saved with"
                         f" {saved} last tokens: at most these")
    ids, spans, text, _ = (kept.pop(name).tolist() for name in ("ids", "spans", "text", SUMS))
    release = mapped.release
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
                "num_tokens": [], SUMS: [layers + 1]}
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


class MappedFile:
    """A document's file. Its rows are mapped: they are read from disk when they are asked for."""

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            self.path, self.mapping = path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        data = 8 + int.from_bytes(self.mapping[:8], "little")  # where they begin
        header = json.loads(self.mapping[8:data])
        header.pop("__metadata__", None)
        self.places = {name: tuple(data + offset for offset in tensor["data_offsets"])
                       for name, tensor in header.items()}  # of the tensors, (begin, end)
        self.layers = [name for name in self.places if name.endswith(".rows")]
        self.sums = self.places.get(SUMS, (0, 0))

    def parts(self, name: str) -> list:
        """The bytes that have a checksum together, as (begin, end): a layer's rows, or OTHERS."""
        if name != OTHERS:
            return [self.places[name]]
        ends = sorted(chain(self.sums, *(self.places[layer] for layer in self.layers)))
        return [*zip([0, *ends[1::2]], [*ends[::2], len(self.mapping)])]

    def checksum(self, name: str) -> bytes:
        """Read, not mapped: a disk that fails raises an error, and does not end the process."""
        total = 0
        with open(self.path, "rb") as file:
            for begin, end in self.parts(name):
                file.seek(begin)
                while block := file.read(min(BLOCK, end - begin)):
                    total, begin = zlib.crc32(block, total), begin + len(block)
        return total.to_bytes(8, "little")

    def check(self, names):
        """Compare the checksums of these parts. ValueError names the first one that is wrong."""
        for name in names:
            place = self.sums[0] + 8 * [*self.layers, OTHERS].index(name)
            if self.mapping[place : place + 8] != self.checksum(name):
                raise ValueError(f"{self.path} is damaged: the checksum of {name} is wrong")

    def rows(self, dtype: torch.dtype, shapes: dict) -> dict:
        """The rows of each layer (N, H_kv, 2, D), by name."""
        return {name: torch.frombuffer(memoryview(self.mapping)[slice(*self.places[name])],
                                       dtype=dtype).view(shapes[name]) for name in self.layers}

    def release(self, name: str):
        """Give the memory of a layer's rows back. They are read again when they are asked for."""
        begin, end = self.places[name]
        start = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only
        size = end // mmap.PAGESIZE * mmap.PAGESIZE - start
        if size > 0:
            self.mapping.madvise(mmap.MADV_DONTNEED, start, size)


def add_checksums(path: Path):
    """Write into a document's file the checksums of its parts."""
    mapped = MappedFile(path)
    sums = [mapped.checksum(name) for name in (*mapped.layers, OTHERS)]
    with open(path, "r+b") as file:
        file.seek(mapped.sums[0])
        file.write(b"".join(sums))
