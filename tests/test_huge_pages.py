"""Memory in huge pages: it stays as it is, and a system that cannot do it is no error."""

import ctypes
import sys

import pytest
import torch

from support import huge_pages
from support.huge_pages import PAGE, use_huge_pages


def huge_kib() -> int:
    """KiB of this process's memory that are in huge pages."""
    with open("/proc/self/smaps_rollup", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("AnonHugePages"))


def can_collapse() -> bool:
    """Whether this system collapses a region of its own."""
    if sys.platform != "linux":
        return False
    memory = torch.ones(4 * PAGE, dtype=torch.uint8)
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    first = -(-memory.data_ptr() // PAGE) * PAGE
    return madvise(first, PAGE, huge_pages.COLLAPSE) == 0


@pytest.mark.skipif(not can_collapse(), reason="needs Linux 6.1 or later with huge pages")
def test_memory_is_the_same_in_huge_pages():
    numbers = torch.arange(2**22)  # 32 MiB
    address, before = numbers.data_ptr(), huge_kib()
    use_huge_pages()
    assert huge_kib() > before
    assert numbers.data_ptr() == address and torch.equal(numbers, torch.arange(2**22))


def test_a_system_without_them_changes_nothing(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("asked for the C library"))
    use_huge_pages()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(huge_pages, "open", lambda *_, **__: open("/no/such/file"), raising=False)
    use_huge_pages()
