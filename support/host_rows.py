"""Rows of a layer in CPU memory: they are written beside the computation, and read back by index.

For a GPU the memory is pinned: a copy runs beside the computation, and a kernel can read it.
`kv` is the data of rows: key and value side by side (2, D'), packed (`support/bits.py`).
"""

import os

import numpy as np
import torch

from support.bits import Packing

try:  # comes with PyTorch where there is a GPU
    import triton
    import triton.language as tl
except ImportError:
    triton = None

ROW_BLOCK = 256  # the least room for rows after the first text


class Copies:
    """Copies from a device to the host, on a stream of their own, for all layers. At most one is in
    flight: if the bus is slow, one layer at most waits on the device."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.in_flight = None  # keeps the source of a copy alive until the copy is done

    def start(self, target: torch.Tensor, source: torch.Tensor):
        if self.stream is None:
            target.copy_(source)
            return
        self.wait()
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        self.in_flight = source

    def wait(self):
        """Later work on the current stream waits for the copy in flight."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
            self.in_flight = None

    def finish(self):
        """The host waits for the copy in flight."""
        if self.stream is not None:
            self.stream.synchronize()
            self.in_flight = None


class HostRows:
    """The rows of one layer: `first` (N, H_kv, 2, D') are those of the first text, `later` those of
    what is read and written after it. The rows of `later` follow those of `first`."""

    def __init__(self, heads: int, dim: int, bits: int, dtype: torch.dtype, copies: Copies):
        self.heads, self.device, self.copies = heads, copies.device, copies
        self.packing = Packing(heads, dim, bits, self.device, dtype)
        self.first, self.later = self.empty(0), self.empty(0)
        self.wants_positions, self.positions = False, None  # of the first rows (H_kv, N), int32
        self.release = None  # of a mapped file: gives back the memory of the first rows

    @torch.inference_mode(False)  # a tensor made in inference mode cannot be changed outside it
    def empty(self, n_rows: int) -> torch.Tensor:
        packing = self.packing
        return torch.empty(n_rows, self.heads, 2, packing.width, dtype=packing.kept_dtype,
                           pin_memory=self.device.type == "cuda")

    @property
    def nbytes(self) -> int:
        return self.first.nbytes + self.later.nbytes

    def note_positions(self, positions: torch.Tensor):
        """The first rows are those of the tokens at these positions (H_kv, N)."""
        if self.wants_positions:
            self.positions = positions.int().cpu()

    def hold(self, first: torch.Tensor, release=None):
        """Have these rows (N, H_kv, 2, D') as those of the first text, and no others."""
        self.first, self.later, self.release = first, self.empty(0), release

    def reserve(self, n_rows: int):
        """Make room for `n_rows` in all. `later` doubles, so that it is seldom copied."""
        n_later = n_rows - len(self.first)
        if n_later > len(self.later):
            self.copies.finish()
            grown = self.empty(max(n_later, 2 * len(self.later), ROW_BLOCK))
            grown[: len(self.later)] = self.later
            self.later = grown

    def write(self, first_row: int, kv: torch.Tensor):
        """Start to copy kv (H_kv, n, 2, D') to the rows from `first_row` on. From row 0 on they are
        those of the first text."""
        kv = kv.transpose(0, 1).contiguous()  # (n, H_kv, 2, D'), one block as on the host
        if first_row == 0:
            self.hold(self.empty(len(kv)))
            self.copies.start(self.first, kv)
            return
        self.reserve(first_row + len(kv))
        start = first_row - len(self.first)
        self.copies.start(self.later[start : start + len(kv)], kv)

    def read(self, begin: int, end: int) -> torch.Tensor:
        """Rows `begin` to `end` on the device, (H_kv, n, 2, D')."""
        self.copies.finish()
        n_first = len(self.first)
        parts = (self.first[begin:end],
                 self.later[max(begin - n_first, 0) : max(end - n_first, 0)])
        kv = torch.cat([part.to(self.device).transpose(0, 1) for part in parts], dim=1)
        if self.release:
            self.release()
        return kv


def load_rows(first, later, slots, rows, missing):
    """Copy the missing ones of `rows` (H_kv, B) into the first B `slots` (H_kv, n, 2, D'), from
    `first` and `later` (N, H_kv, 2, D') of a `HostRows`."""
    # As 32-bit numbers: a row has 2 · (D + 2) bytes, or 4 · D or more, and D is even.
    first, later, slots = (x.flatten(-2).view(torch.int32) for x in (first, later, slots))
    if triton and (slots.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):  # 1: in tests
        (heads, n_row_slots), size = rows.shape, slots[0, 0].numel()
        copy_missing[n_row_slots, heads](
            first, later, len(first), slots, rows, missing, slots.shape[1], size,
            triton.next_power_of_2(size), num_warps=1)
        return
    # The CPU waits for a GPU, then gathers. NumPy takes half as long for it as PyTorch.
    n_first = len(first)
    head, slot = missing.cpu().numpy().nonzero()
    row = rows.cpu().numpy()[head, slot]
    found = first.numpy()[np.minimum(row, n_first - 1), head]
    is_later = row >= n_first
    if is_later.any():
        found[is_later] = later.numpy()[row[is_later] - n_first, head[is_later]]
    if slots.is_cuda:
        slots[head, slot] = torch.from_numpy(found).to(slots.device)
    else:
        slots.numpy()[head, slot] = found


# For `torch.compile` it is one operator, whose inside it does not see.
torch.library.define("sentencekv::load_rows", "(Tensor first, Tensor later, Tensor(a!) slots,"
                     " Tensor rows, Tensor missing) -> ()")
torch.library.impl("sentencekv::load_rows", "default", load_rows)
torch.library.register_fake("sentencekv::load_rows", lambda *tensors: None)


def load_missing(host: HostRows, slots, rows, missing):
    """`load_rows` from a layer's host rows. Where nothing is compiled, a plain call is faster."""
    load = torch.ops.sentencekv.load_rows if torch.compiler.is_compiling() else load_rows
    load(host.first, host.later, slots, rows, missing)


if triton:
    @triton.jit
    def copy_missing(first, later, n_first, slots, rows, missing, n_slots, size,
                     BLOCK: tl.constexpr):
        """One program for each of a head's B slots. It reads pinned host memory directly."""
        slot, head, heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
        here = head * tl.num_programs(0) + slot
        if tl.load(missing + here):
            channel, row = tl.arange(0, BLOCK), tl.load(rows + here).to(tl.int64)
            target = slots + (head * n_slots + slot) * size + channel
            if row < n_first:
                source = first + (row * heads + head) * size + channel
            else:
                source = later + ((row - n_first) * heads + head) * size + channel
            tl.store(target, tl.load(source, mask=channel < size), mask=channel < size)
