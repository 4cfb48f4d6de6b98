"""Memory in huge pages: it stays as it is, and a system that cannot do it is no error."""

import ctypes
import sys
from types import SimpleNamespace

import pytest
import torch

from support import huge_pages
from support.huge_pages import use_huge_pages

MAPS = b"""\
7f0000000000-7f0000a00000 rw-p 00000000 00:00 0
7f0001000001-7f0001ffffff rw-p 00000000 00:00 0                          [anon: glibc: malloc]
7f0002000000-7f0002100000 rw-p 00000000 00:00 0                          [heap]
7f0003000000-7f0003a00000 r--p 00000000 00:00 0
7f0004000000-7f0004a00000 rw-p 00000000 fd:00 77                         /home/Andr\xe9 Li/a\rb.bin
7ffc00000000-7ffc00a00000 rw-p 00000000 00:00 0                          [stack]
"""


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A Linux with huge pages of 2 MiB, and the calls of its `madvise`, which all fail."""
    calls = []

    def madvise(*arguments):
        calls.append(arguments)
        return -1

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(madvise=madvise))
    for name, content in (("SIZE", b"2097152\n"), ("REGIONS", MAPS)):
        path = tmp_path / name
        path.write_bytes(content)
        monkeypatch.setattr(huge_pages, name, path)
    return SimpleNamespace(calls=calls, folder=tmp_path)


def test_whole_huge_pages_of_data_are_asked_for(system):
    use_huge_pages()
    assert system.calls == [(0x7F0000000000, 0xA00000, 25), (0x7F0001200000, 0xC00000, 25)]


@pytest.mark.parametrize("name, content", [("SIZE", b"536870912\n"), ("SIZE", None),
                                           ("REGIONS", None)])
def test_a_system_without_them_changes_nothing(system, name, content):
    if content is None:
        (system.folder / name).unlink()
    else:
        (system.folder / name).write_bytes(content)
    use_huge_pages()
    assert not system.calls


def test_another_system_is_not_asked(system, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    use_huge_pages()
    assert not system.calls


def test_memory_stays_as_it_is():
    numbers = torch.arange(2**22)  # 32 MiB
    address = numbers.data_ptr()
    use_huge_pages()
    assert numbers.data_ptr() == address and torch.equal(numbers, torch.arange(2**22))
