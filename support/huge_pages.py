"""Memory in pages of 2 MiB, on Linux.

A processor looks up where each page of memory is, and remembers the latest one or two thousand. The
weights of the default model fill 66,000 pages of 4 KiB, and every token reads all of them. In a
virtual machine, a lookup takes several times as long.
"""

import ctypes
import sys

PAGE = 2**21  # bytes
COLLAPSE = 25  # of Linux 6.1 and later: replace small pages by huge ones at once


def use_huge_pages():
    """Move the memory that this process has written so far to huge pages: it keeps its addresses.
    Where the system cannot do it, nothing changes."""
    if sys.platform != "linux":
        return
    try:
        with open("/proc/self/maps", encoding="utf-8") as file:
            regions = [line.split() for line in file]
    except OSError:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for addresses, rights, _, _, inode, *name in regions:
        is_of_file = inode != "0" or name not in ([], ["[heap]"])
        if rights == "rw-p" and not is_of_file:
            first, last = (int(address, 16) for address in addresses.split("-"))
            first, last = -(-first // PAGE) * PAGE, last // PAGE * PAGE
            if first < last:
                madvise(first, last - first, COLLAPSE)
