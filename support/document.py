"""Saved documents: a text from a file, and what a cache kept of it, as one safetensors file.

The safetensors file holds the rows of the host tier and their positions, what the device knows of
the sentences, the text, its tokens and its sentences. Its metadata say which model and which
settings made it. Whoever saves and loads gives an `identity`, which must be the same for both.
"""

import json
import math
import mmap
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT = "sentencekv document 2"
SAME = ("keep_factor", "sink_tokens", "secondary_sinks", "secondary_ratio", "sentence_limit")


@dataclass
class Document:
    text: str
    ids: list[int]  # the tokens that were read: the prompt up to the end of the text
    spans: list  # their sentences, (start, end)
    snapshot: dict  # of the cache after them
    now: datetime  # when it was read: some chat templates print the date
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


def save_document(path: Path, document: Document, identity: dict, protected_tokens: int):
    """Write beside `path` and rename, so that the file is whole, or what it was. ValueError if it
    cannot be written. Of the document, the last `protected_tokens` have all been kept."""
    tensors = {name: tensor.contiguous() for name, tensor in document.snapshot.items()}
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
            tensors = {name: file.get_tensor(name) for name in file.keys() if name != "kv"}
            shape = file.get_slice("kv").get_shape()
    except SafetensorError as error:
        raise ValueError(f"{path} is not a saved document: {error}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        check_tensors(tensors, shape, kv_shape)
        saved, now = int(metadata["protected"]), datetime.fromisoformat(metadata["now"])
    except (KeyError, ValueError, IndexError, RuntimeError) as error:  # others have changed it
        raise ValueError(f"{path} is not a whole document: {error}") from None
    if protected_tokens > saved:  # the other settings are the same, so it is the recent window
        raise ValueError(f"recent_window is {protected_tokens}, and {path} was saved with"
                         f" {saved} last tokens: at most these")
    ids, spans, text = (tensors.pop(name).tolist() for name in ("ids", "spans", "text"))
    tensors["kv"], release = map_rows(path, shape, getattr(torch, identity["dtype"]))
    if device.type == "cuda":
        tensors["kv"], release = tensors["kv"].pin_memory(), None
    return Document(bytes(text).decode(), ids, [tuple(span) for span in spans], tensors, now,
                    release)


def check_tensors(tensors: dict, kv: list, kv_shape: tuple):
    """Compare the shapes of a document's tensors, kv's (L, N, H_kv, 2, D), and what they hold.
    ValueError names those that are wrong, KeyError one that is absent."""
    layers, heads, dim = kv_shape
    spans, bounds, n_rows = tensors["spans"].long(), tensors["bounds"], kv[1]
    n_tokens, n_sentences = tensors["num_tokens"].item(), bounds.shape[-1] - 1
    expected = {
        "vectors": [layers, heads, n_sentences, dim], "variances": [layers, heads, n_sentences],
        "bounds": [layers, heads, n_sentences + 1], "ids": [n_tokens], "spans": [len(spans), 2],
        "text": [tensors["text"].numel()], "num_tokens": []}
    if "positions" in tensors:
        expected["positions"] = [layers, heads, n_rows]
    wrong = [name for name, shape in expected.items() if list(tensors[name].shape) != shape]
    if kv != [layers, n_rows, heads, 2, dim] or not 0 < n_rows <= n_tokens:
        wrong.append("kv")
    ends = [0, *spans.flatten()[1::2].tolist()]
    tiles = spans.flatten()[::2].tolist() == ends[:-1] and ends[-1] == n_tokens
    if not tiles or any(a >= b for a, b in pairwise(ends)):
        wrong.append("spans")
    if bounds.min() < 0 or (bounds.diff() < 0).any() or (bounds[..., -1] != n_rows).any():
        wrong.append("bounds")
    if wrong:
        raise ValueError(f"wrong {', '.join(wrong)}")


def check_identity(path: Path, found: dict, expected: dict):
    for name, value in expected.items():
        if found.get(name) != value:
            what = f"{name} {found.get(name)}, not {value}"
            what = "another model" if name == "model" else what
            raise ValueError(f"{path} was saved with {what}")


def map_rows(path: Path, shape: list, dtype) -> tuple:
    """The rows (L, N, H_kv, 2, D) as a mapping of the file, and a function that gives the memory of
    a layer's rows back: they are read again from the file when they are asked for again."""
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(header_size))["kv"]["data_offsets"]
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    begin, layer_size = 8 + header_size + begin, (end - begin) // shape[0]
    rows = torch.frombuffer(mapping, dtype=dtype, count=math.prod(shape), offset=begin).view(shape)

    def release(layer: int):
        first = begin + layer * layer_size
        start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only
        size = (first + layer_size) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if size > 0:
            mapping.madvise(mmap.MADV_DONTNEED, start, size)

    return rows, release
