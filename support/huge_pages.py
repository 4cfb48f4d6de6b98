"""Memory in pages of 2 MiB, on Linux.

A processor looks up where each page of memory is, and remembers the latest one or two thousand. In
bfloat16, the weights of the default model fill 66,000 pages of 4 KiB, and every token reads all of
them. In a virtual machine, a lookup takes several times as long.
"""

import ctypes
import sys
from pathlib import Path

SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")  # of a huge page in bytes
REGIONS = Path("/proc/self/maps")  # of this process's memory
COLLAPSE = 25  # for `madvise`, Linux 6.1 and later: replace small pages by huge ones at once


def use_huge_pages():
    """Move the memory that this process has written so far to huge pages: it keeps its addresses. A
    huge page takes 2 MiB, also if little of it was written. Where the system cannot do it, nothing
    changes."""
    if sys.platform != "linux":
        return
    try:
        page, regions = int(SIZE.read_bytes()), REGIONS.read_bytes().strip().split(b"\n")
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return
    if page != 2**21:  # some ARM systems have huge pages of 512 MiB
        return
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for region in regions:
        addresses, rights, _, _, file, *name = region.split(maxsplit=5)
        is_data = file == b"0" and (not name or name[0].startswith((b"[heap]", b"[anon")))
        if is_data and rights == b"rw-p":
            first, last = (int(address, 16) for address in addresses.split(b"-"))
            first, last = -(-first // page) * page, last // page * page
            if first < last:
                madvise(first, last - first, COLLAPSE)
