"""Pages of memory-mapped files, given back before they pile up.

A process keeps each page of a mapped file that it touched until the system wants it back. Over a set larger than memory that
looks like a leak, and limits on resident memory (containers, schedulers) end the process.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable

LIMIT = 128_000_000
"""Bytes that may be touched before they are given back; to map them again takes milliseconds."""


class MappedPages:
    """The pages of `files` that this process maps only to read. Elsewhere than on Linux nothing is given back."""

    def __init__(self, files: Iterable[str | os.PathLike]):
        self.files = frozenset(os.path.realpath(file) for file in files)
        self._before = _resident_bytes()

    def trim(self) -> None:
        """Gives the pages back where more than `LIMIT` bytes were touched since the last time; their content stays valid."""
        resident = _resident_bytes()
        self._before = min(self._before, resident)
        if resident - self._before > LIMIT:
            libc = ctypes.CDLL(None)
            for start, length in self._mappings():
                # Nobody writes to these pages, so no content is lost: the next touch reads the file again.
                # Pages that somebody locked into memory stay, as they should.
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
            self._before = _resident_bytes()

    def _mappings(self) -> list[tuple[int, int]]:
        """Address and length of each mapping of the files that cannot be written to."""
        found = []
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                place, rights, _, _, _, *path = line.rstrip("\n").split(maxsplit=5)
                if rights.startswith("r--") and path and path[0] in self.files:
                    start, end = (int(address, 16) for address in place.split("-"))
                    found.append((start, end - start))
        return found


def _resident_bytes() -> int:
    """Resident bytes of this process that belong to files or are shared, 0 where the system does not tell."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[2]) * mmap.PAGESIZE
