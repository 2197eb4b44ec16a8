"""The seam between sources and what is done with them: a reader yields the members of one shard.

The loop of `extract.extractor` takes a reader and a sink and knows nothing of formats. Each format has its reader in
a module of this package; `extract.extractor.open_reader` picks it by `Shard.format`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Protocol

from imagenet_unpack.errors import ArchiveError

WINDOW_BYTES = 8 << 20
"""How much is read at once, at most, and the size of a process's buffer."""

Write = Callable[[int, memoryview], None]
"""Write all of a piece to a descriptor; rate limits are the writer's business."""

Entry = tuple[int, str, int, float]
"""A member: position in `Shard.classes`, file name, size in bytes, modification time in seconds since the epoch."""


class SourceError(ArchiveError):
    """The archive could not be read: an I/O error, or it is not the file that was planned."""


class ReadPace(Protocol):
    """What a reader asks before it reads; it may wait, and may raise to end the shard.

    Attributes:
        window_bytes: how much to read at once, a multiple of the tar block; at most `WINDOW_BYTES` is.
    """

    window_bytes: int

    def window(self, nbytes: int) -> None:
        """Before `nbytes` are read from the archive."""


class Reader(Protocol):
    """The members of one shard, in the order in which they are read; a context manager that opens the archive.

    Errors of the archive are `ArchiveError`, those of reading it `SourceError`; any `OSError` that leaves a reader is
    one of the descriptor that `copy` writes to.
    """

    def __enter__(self) -> Reader: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def names(self) -> Iterable[tuple[int, str]] | None:
        """Return position in `Shard.classes` and name of every file to come.

        None where only reading can tell; then the folders of the shard's classes are the shard's alone.
        """

    def members(self) -> Iterator[Entry]:
        """Yield every member; a second call starts again. Raises for whatever makes the shard faulty as a whole."""

    def copy(self, fd: int, write: Write) -> int:
        """Write the bytes of the member yielded last to `fd`, in pieces, and return their xxh3-64 digest."""

    def finish(self) -> tuple[str, ...]:
        """Verify, after the last member, that the archive is still the one that was planned; return notes on it."""
