"""How fast rows of the host come to the device: `python -m benchmarks.bus`.

The rows are those of one layer of Llama 3.1 8B, which has 8 KV heads: a row is a key and a value of
128 channels in 8 bits, with their scales, 260 bytes. For some numbers of missing rows in each head
it prints the time to bring them to the slots of the device, and GB/s, in four ways:

    pageable   copies as many bytes in one block, from memory that is not pinned
    pinned     copies them in one block, from pinned memory
    gathered   the CPU collects the rows in a pinned block, and copies the block
    kernel     a kernel reads the rows from pinned memory, and writes them to the slots

`kernel` is `support.host_rows.load_rows`, which the cache calls. Times are medians, with the start
of a call and the wait for its end. Without a GPU there is no bus, no pinned memory and no kernel:
the columns show then how the lab is done, and nothing else.
"""

import sys
import time
from statistics import median

import torch

from benchmarks import plain_parser, with_status
from benchmarks.engine import numbers
from benchmarks.speed import bandwidth, synchronize
from support.host_rows import load_rows
from weights.checkpoint import pick_device

HEADS, WIDTH = 8, 128 + 2  # of a key in 8 bits
ROW_BYTES = 2 * WIDTH
N_WARM, N_TIMED = 3, 20


def seconds(call, device) -> float:
    """Of a call, the median."""
    times = []
    for _ in range(N_WARM + N_TIMED):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times[N_WARM:])


def ways(host, n_missing: int, device) -> dict:
    """Name -> a function that brings `n_missing` rows in each head to slots (H_kv, B, 2, D') of the
    device, from rows of the host (N, H_kv, 2, D') at random places."""
    slots = torch.zeros(HEADS, n_missing, 2, WIDTH, dtype=host.dtype, device=device)
    rows = torch.stack([torch.randperm(len(host))[:n_missing] for _ in range(HEADS)])  # (H_kv, B)
    missing = torch.ones_like(rows, dtype=torch.bool)
    pageable = torch.zeros(slots.shape, dtype=slots.dtype)
    block = torch.zeros(slots.shape, dtype=slots.dtype, pin_memory=host.is_pinned())
    order = (rows * HEADS + torch.arange(HEADS)[:, None]).flatten()
    rows_there, missing_there, later = rows.int().to(device), missing.to(device), host[:0]

    def gathered():
        torch.index_select(host.flatten(0, 1), 0, order, out=block.flatten(0, 1))
        slots.copy_(block, non_blocking=True)

    return {"pageable": lambda: slots.copy_(pageable),
            "pinned": lambda: slots.copy_(block, non_blocking=True),
            "gathered": gathered,
            "kernel": lambda: load_rows(host, later, slots, rows_there, missing_there)}


def table(n_rows: int, counts: list[int], device) -> str:
    """Microseconds and GB/s of each way, one line for each number of missing rows."""
    host = torch.zeros(n_rows, HEADS, 2, WIDTH, dtype=torch.int8,
                       pin_memory=device.type == "cuda")
    lines = []
    for n_missing in counts:
        size, cells = HEADS * n_missing * ROW_BYTES, []
        for call in (found := ways(host, n_missing, device)).values():
            taken = seconds(call, device)
            cells.append(f"{taken * 1e6:,.0f} ({size / taken / 1e9:.1f})")
        lines.append(" | ".join(["", f"{n_missing:,}", f"{size / 1024:,.0f}", *cells, ""]).strip())
    heading = " | ".join(["", "rows a head", "KiB", *(f"{name}: µs (GB/s)" for name in found), ""])
    return "\n".join([heading.strip(), "|---" * (len(found) + 2) + "|", *lines])


@with_status
def main(arguments=None):
    parser = plain_parser("bus", __doc__)
    parser.add_argument("--missing", type=numbers(), default=[1, 16, 64, 256, 1024],
                        help="missing rows in each head")
    parser.add_argument("--rows", type=int, default=131072, help="rows of the host")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)
    if not 0 < min(args.missing) <= max(args.missing) <= args.rows:
        raise ValueError(f"--missing is {args.missing}, must be 1 to --rows, {args.rows}")
    device = pick_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU, without a bus"
    print(f"{name}, torch {torch.__version__}; a copy within the device moves"
          f" {bandwidth(device) / 1e9:,.0f} GB/s\n\n{table(args.rows, args.missing, device)}")


if __name__ == "__main__":
    sys.exit(main())
