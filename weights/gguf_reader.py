"""What a GGUF file says: its metadata and its tensors.

    "GGUF", the version, how many tensors, how many keys
    keys: name, type, value
    tensors: name, dimensions from the fastest to the slowest, type, where its data begins
    padding, then the data

The file is mapped into memory, and a tensor's data stays there. Every length is compared with what
is left of the file before anything is made of that length. All problems are ValueErrors, which do
not name the file.
"""

import math
import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from weights.folder import shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # little-endian
NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
           10: "<u8", 11: "<i8", 12: "<f8"}  # type of a value -> NumPy's name
TEXT, ARRAY = 8, 9


class Tensor(NamedTuple):
    shape: tuple  # rows first, as in a checkpoint
    kind: GGMLQuantizationType
    data: np.ndarray  # bytes, of the tensor's shape but for the last axis: (…, bytes of a row)


class Cursor:
    """Reads one value after another."""

    def __init__(self, data):
        self.data, self.place = data, 0

    def skip(self, size: int) -> int:
        """Go on by `size` bytes. Returns where they begin."""
        start = self.place
        if size > len(self.data) - start:
            raise ValueError("the file ends too early")
        self.place += size
        return start

    def numbers(self, kind: str, count: int) -> np.ndarray:
        return np.frombuffer(self.data, kind, count, self.skip(np.dtype(kind).itemsize * count))

    def number(self, kind: str):
        return self.numbers(kind, 1)[0].item()

    def text(self) -> str:
        size = self.number("<u8")
        start = self.skip(size)
        return self.data[start:start + size].decode()

    def value(self, kind: int):
        """A number, a string, an array of numbers (n,), or a list of strings."""
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.number(number_type(kind))
        kind, count = self.number("<u4"), self.number("<u8")
        if kind != TEXT:
            return self.numbers(number_type(kind), count)
        if count > (len(self.data) - self.place) // 8:  # a string has a length of 8 bytes
            raise ValueError("the file ends too early")
        return [self.text() for _ in range(count)]


def number_type(kind: int) -> str:
    if kind not in NUMBERS:
        raise ValueError(f"a value has type {kind}, which is not known")
    return NUMBERS[kind]


def read_gguf(path: Path) -> tuple[dict, dict]:
    """The metadata as key -> value, and name -> Tensor. ValueError if the file is not whole."""
    with open(path, "rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError("this is not a GGUF file")
        cursor = Cursor(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    cursor.skip(4)
    if (version := cursor.number("<u4")) not in VERSIONS:
        raise ValueError(f"GGUF version {version} is not supported, only 2 and 3")
    n_tensors, n_keys = cursor.number("<u8"), cursor.number("<u8")
    metadata = {}
    for _ in range(n_keys):
        key, kind = cursor.text(), cursor.number("<u4")
        if key in metadata:
            raise ValueError(f"the key {shown(key)} is there twice")
        metadata[key] = cursor.value(kind)
    return metadata, read_tensors(cursor, n_tensors, metadata.get("general.alignment", 32))


def read_tensors(cursor: Cursor, count: int, alignment) -> dict:
    """Name -> Tensor. The cursor is where their descriptions begin."""
    described = {}
    for _ in range(count):
        name, *description = read_description(cursor)
        if name in described:
            raise ValueError(f"the tensor {shown(name)} is there twice")
        described[name] = description
    if type(alignment) is not int or not 0 < alignment <= 2**20:
        raise ValueError(f"general.alignment is {shown(alignment)}")
    begin = math.ceil(cursor.place / alignment) * alignment
    tensors, left = {}, len(cursor.data) - begin
    for name, (shape, kind, offset) in described.items():
        block, block_bytes = GGML_QUANT_SIZES[kind]
        rows, row_bytes = math.prod(shape[:-1]), shape[-1] // block * block_bytes
        left -= rows * row_bytes  # of all of them: none shares its data with another
        if left < 0 or begin + offset + rows * row_bytes > len(cursor.data):
            raise ValueError(f"the file ends too early: {shown(name)} is not whole")
        data = np.frombuffer(cursor.data, np.uint8, rows * row_bytes, begin + offset)
        tensors[name] = Tensor(shape, kind, data.reshape(*shape[:-1], row_bytes))
    return tensors


def read_description(cursor: Cursor) -> tuple:
    """A tensor's name, shape, type, and where its data begins."""
    name, n_axes = cursor.text(), cursor.number("<u4")
    if not 1 <= n_axes <= 4:
        raise ValueError(f"the tensor {shown(name)} has {n_axes} dimensions")
    shape = tuple(cursor.numbers("<u8", n_axes).tolist()[::-1])
    number, offset = cursor.number("<u4"), cursor.number("<u8")
    if number not in iter(GGMLQuantizationType):
        raise ValueError(f"the tensor {shown(name)} has type {number}, which is not known")
    kind = GGMLQuantizationType(number)
    if min(shape) < 1 or shape[-1] % GGML_QUANT_SIZES[kind][0]:
        raise ValueError(f"the tensor {shown(name)} has shape {shape}, type {kind.name}")
    return name, shape, kind, offset
