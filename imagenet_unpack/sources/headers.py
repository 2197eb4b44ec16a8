"""A tar of which the headers alone are read: 512 bytes here and there, nothing of what lies between them."""

from __future__ import annotations

import os

from imagenet_unpack.sources.reader import SourceError
from imagenet_unpack.sources.tarindex import BLOCK
from imagenet_unpack.sources.windows import WindowedFile

_PACED_BYTES = 64 << 10


class HeaderFile(WindowedFile):
    """An archive whose members' bytes are not wanted; takes the place of the windows under a `TarReader`."""

    _unpaced_bytes = 0

    def open(self) -> None:
        """Open the archive, if it is still the one that was planned."""
        super().open()
        # Headers are 100 KB and more apart: reading ahead would only move bytes that nobody looks at.
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    def expect(self, offset: int) -> None:
        """Let the kernel fetch the header at `offset` without waiting for it."""
        os.posix_fadvise(self._fd, offset, BLOCK, os.POSIX_FADV_WILLNEED)

    def block(self, offset: int, size: int, end: int) -> bytes:
        """Return `size` bytes at `offset`."""
        self._unpaced_bytes += size
        if self._unpaced_bytes >= _PACED_BYTES:
            self._pace.window(self._unpaced_bytes)
            self._unpaced_bytes = 0
        data = self.read_at(offset, size)
        if len(data) != size:
            raise SourceError(f"{self._archive.path}: it ends at byte {offset + len(data)}: cut off during the run")
        return data
