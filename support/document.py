"""Saved documents: a text from a file, and what a cache kept of it, as one safetensors file.

The file holds, for each layer, the rows of the host with their positions and what the device knows
of the sentences; and the text, its tokens and its sentences. Its metadata say which model and which
settings made it. Whoever saves and loads gives an `identity`, which must be the same for both.

Checksums cover every byte. They are for damage, not against attackers, so they are CRC-32: it finds
each flipped bit, and is fast without special hardware. All are compared when the file is loaded:
the first question attends to every row, so that comparing them later would save no time. Whoever
changes a file on purpose can change them, too: `support/schema.py` checks what is held, and whoever
loads compares the tokens with those of the text.
"""

import re
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.mapped import OTHERS, SUMS, MappedFile, add_checksums, check_regular
from support.outputs import replacing
from support.schema import CHANNELS, SAVED_TABLE, check_header, check_values, shown
from support.table import make_room

FORMAT = "sentencekv document 9"
SAME = ("keep_factor", "sink_tokens", "secondary_sinks", "secondary_ratio", "sentence_limit",
        "kv_bits", "reuse_layers")


@dataclass
class Document:
    text: str = ""
    ids: list[int] = field(default_factory=list)  # the prompt up to the end of the text
    spans: list = field(default_factory=list)  # their sentences, (start, end)
    now: datetime | None = None  # when it was read: some chat templates print the date
    kept: dict | None = None  # of a file: the tensors of `snapshot`
    release: Callable[[str], None] | None = None  # gives back the memory of a layer's rows
    check_unchanged: Callable[[], None] = lambda: None  # raises OSError for a file that is in use

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
                                          model_config, device)

    def save(self, document: Document, cache):
        """If --save asks for it. Nothing may have been read or written after the document."""
        if self.path:
            document.check_unchanged()
            save_document(self.path, document, snapshot(cache), self.identity,
                          self.protected_tokens)


def want_positions(cache):
    """Before a text is read that will be saved: a trace of what is loaded needs its positions."""
    for layer in cache.layers:
        layer.host.wants_positions = True


def snapshot(cache) -> dict:
    """What a cache keeps of its first text, in tensors that are not copied. It was to
    `want_positions`, and nothing may have been read or written since."""
    plan = cache.plan
    assert cache.first_text == (plan.num_tokens, plan.n_places) and plan.n_rows == plan.open_row
    tensors = {"num_tokens": torch.tensor(plan.num_tokens)}
    for i, layer in enumerate(cache.layers):
        tensors |= {f"{i}.{name}": getattr(layer, name)[:, : plan.n_places]
                    for name in SAVED_TABLE if hasattr(layer, name)}
        tensors |= {f"{i}.rows": layer.host.first, f"{i}.positions": layer.host.positions}
        tensors |= {f"{i}.{name}": getattr(layer.packing, name) for name in CHANNELS}
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
        layer.host.positions = tensors.get(f"{i}.positions")  # a benchmark has none
        for name in SAVED_TABLE:
            if hasattr(layer, name):
                getattr(layer, name)[:, :n_places] = tensors[f"{i}.{name}"]
        for name in CHANNELS:
            getattr(layer.packing, name).copy_(tensors[f"{i}.{name}"])
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


def load_document(path: Path, identity: dict, protected_tokens: int, model_config,
                  device: torch.device) -> Document:
    """The document in a file, for a cache of a model with this configuration. The rows are mapped:
    they are read from disk when they are asked for. For a GPU they are read and pinned.

    ValueError for a file that is no whole document, or one of another model or other settings.
    """
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            check_identity(path, metadata, {"format": FORMAT})
            mapped = MappedFile(path, metadata)
            mapped.check([OTHERS])  # first: damage may look like another model
            check_identity(path, metadata, identity)
            check_metadata(path, metadata, identity, protected_tokens)
            kept = checked_tensors(file, mapped, model_config, identity)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a saved document: {shown(error)}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    text = bytes(kept.pop("text").numpy()).decode()
    ids, spans = (kept.pop(name).tolist() for name in ("ids", "spans"))
    document = Document(text, ids, [tuple(span) for span in spans],
                        datetime.fromisoformat(metadata["now"]), kept)
    if device.type == "cuda":
        kept |= {name: kept[name].pin_memory() for name in mapped.layers}
    else:
        document.release, document.check_unchanged = mapped.release, mapped.check_unchanged
    return document


def checked_tensors(file, mapped: MappedFile, model_config, identity: dict) -> dict:
    """The tensors of an open document, not copied, once all are as they must be."""
    slices = {name: file.get_slice(name) for name in mapped.ranges}
    found = {name: (x.get_dtype(), tuple(x.get_shape())) for name, x in slices.items()}
    with whole(mapped.path):
        check_header(found, mapped.ranges, model_config, identity)
    mapped.check(mapped.layers)
    kept = {name: file.get_tensor(name) for name in found if name not in mapped.layers}
    with whole(mapped.path):
        check_values(kept, model_config, identity)
    del kept[SUMS]
    return kept | mapped.rows(kept["0.vectors"].dtype, found["0.rows"][1])


@contextmanager
def whole(path: Path):
    """A ValueError in here means that somebody changed the file on purpose: its checksums are
    right."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} is not a whole document: {shown(error)}") from None


def check_metadata(path: Path, metadata: dict, identity: dict, protected_tokens: int):
    """ValueError for metadata that no document has, and for one with fewer protected tokens."""
    saved, now = metadata.get("protected", ""), metadata.get("now", "")
    with whole(path):
        if datetime.fromisoformat(now).isoformat() != now:
            raise ValueError("wrong now")
        if not re.fullmatch("[0-9]{1,9}", saved):
            raise ValueError("wrong protected")
        if other := metadata.keys() - identity.keys() - {"format", "protected", "now"}:
            raise ValueError(f"unknown {min(other)}")
    if protected_tokens > int(saved):  # the other settings are the same: it is the recent window
        raise ValueError(f"recent_window is {protected_tokens}, and {path} was saved with"
                         f" {saved} last tokens: at most these")


def check_identity(path: Path, found: dict, expected: dict):
    for name, value in expected.items():
        if found.get(name) != value:
            what = f"{name} {shown(found.get(name))}, not {value}"
            what = "another model" if name == "model" else what
            raise ValueError(f"{path} was saved with {what}")
