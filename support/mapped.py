"""The file of a saved document: its rows stay on the disk, and no change of its bytes is missed."""

import json
import mmap
import os
import stat
import zlib
from itertools import chain
from pathlib import Path

import torch

SUMS = "checksums"  # a tensor (L + 1): of the rows of each layer, then of all OTHERS
OTHERS = "text and tables"  # and the header: all bytes but rows and checksums
BLOCK = 2**20  # bytes that are read at a time


def check_regular(path: Path):
    """OSError if it is no file, or a pipe or a device: to open these can wait, or do something."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is not a regular file")


class MappedFile:
    """A document's file. Its rows are mapped: they are read from disk when they are asked for. If
    it is cut meanwhile, the system ends the program (`support.environment.end_at_bus_error`)."""

    def __init__(self, path: Path, metadata: dict | None = None):
        """OSError if the file has other metadata than these: then it was replaced by another."""
        self.path, self.file = path, open(path, "rb", buffering=0)
        self.opened = self.state()
        self.mapping = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_COPY)
        data = 8 + int.from_bytes(self.mapping[:8], "little")  # where they begin
        header = json.loads(self.mapping[8:data])
        if header.pop("__metadata__", metadata) != metadata and metadata is not None:
            raise OSError("it was replaced meanwhile")
        self.ranges = {name: tuple(data + offset for offset in tensor["data_offsets"])
                       for name, tensor in header.items()}  # of the tensors, (begin, end)
        self.layers = [name for name in self.ranges if name.endswith(".rows")]
        self.sums = self.ranges.get(SUMS, (0, 0))

    def state(self) -> tuple:
        """Of the file that is open: another one can have its name by now."""
        found = os.fstat(self.file.fileno())
        return found.st_size, found.st_mtime_ns

    def check_unchanged(self):
        """OSError if the file was changed since it was opened: a ValueError would not end a chat.
        A file that was put in its place is no change: the one that is mapped still exists."""
        if self.state() != self.opened:
            raise OSError(f"{self.path} was changed while it was in use")

    def parts(self, name: str) -> list:
        """The bytes that have a checksum together, as (begin, end): a layer's rows, or OTHERS."""
        if name != OTHERS:
            return [self.ranges[name]]
        ends = sorted(chain(self.sums, *(self.ranges[layer] for layer in self.layers)))
        return [*zip([0, *ends[1::2]], [*ends[::2], len(self.mapping)])]

    def checksum(self, name: str) -> bytes:
        """Read, not mapped: a disk that fails raises an error, and does not end the process."""
        total = 0
        for begin, end in self.parts(name):
            self.file.seek(begin)
            while block := self.file.read(min(BLOCK, end - begin)):
                total, begin = zlib.crc32(block, total), begin + len(block)
        return total.to_bytes(8, "little")

    def check(self, names):
        """Compare the checksums of these parts. ValueError names the first one that is wrong."""
        for name in names:
            place = self.sums[0] + 8 * [*self.layers, OTHERS].index(name)
            if self.mapping[place : place + 8] != self.checksum(name):
                raise ValueError(f"{self.path} is damaged: the checksum of {name} is wrong")

    def rows(self, dtype: torch.dtype, shape: tuple) -> dict:
        """The rows of each layer, of this shape (N, H_kv, 2, D'), by name."""
        return {name: torch.frombuffer(memoryview(self.mapping)[slice(*self.ranges[name])],
                                       dtype=dtype).view(shape) for name in self.layers}

    def release(self, name: str):
        """Give the memory of a layer's rows back. They are read again when they are asked for."""
        begin, end = self.ranges[name]
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
