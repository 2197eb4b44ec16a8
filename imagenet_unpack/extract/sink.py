"""The seam between what reads members and what stores them: a sink takes the members of one shard."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Protocol

from imagenet_unpack.model import ClassRef, Shard
from imagenet_unpack.sources.reader import WINDOW_BYTES, ReadPace, Write

Copy = Callable[[int, Write], int]
"""`Reader.copy`: write the current member's bytes to a descriptor and return their digest."""


class Pace(ReadPace, Protocol):
    """What is asked before each step of a shard; each may wait, and may raise to end the shard."""

    def create(self) -> None:
        """Before a file is created."""

    def write(self, nbytes: int) -> None:
        """Before `nbytes` are written."""


class Unpaced:
    """A pace that never waits."""

    window_bytes = WINDOW_BYTES

    def window(self, nbytes: int) -> None:
        """Go on."""

    def create(self) -> None:
        """Go on."""

    def write(self, nbytes: int) -> None:
        """Go on."""


class LeftoverError(Exception):
    """Something has the name of the member that is being added."""


class Sink(Protocol):
    """Stores the members of one shard; a context manager. An `OSError` that leaves it is one of the target."""

    def __enter__(self) -> Sink: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def prepare(self, shard: Shard) -> None:
        """Get ready for the members of a shard; called once, before all else."""

    def remove(self, shard: Shard, names: Iterable[tuple[int, str]] | None) -> None:
        """Remove what an earlier attempt at a prepared shard left: `names` as in `Reader.names`."""

    def add(self, ref: ClassRef, name: str, size_bytes: int, mtime_s: float, copy: Copy) -> int:
        """Store a member, which calls `copy` exactly once, and return the digest of its bytes.

        Raises:
            LeftoverError: something of this name is there.
        """

    def finish(self) -> None:
        """Bring what was added to the disk, where the run's own sync cannot; called once, when all was added."""
