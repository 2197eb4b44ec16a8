"""Per-host status file: how far the shards at work are and what they wait for, written by workers, read by the run.

The file lives in memory and has no name in any folder (memfd_create(2)): a run that is killed leaves nothing behind,
and no folder has to be writable. Workers of the same host open it through /proc. A shard's slot is its position in the
order in which the run hands shards out. It is for display alone: nothing depends on it, and where it cannot be made or
opened (another host, no /proc) nothing is shown.
"""

from __future__ import annotations

import os
import secrets
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

TICK_S = 0.5
_SLOT = struct.Struct("<qq112s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a worker reports: bytes of the shard that were read, images written, and what it waits for, or ""."""

    size_bytes: int = 0
    images: int = 0
    waiting: str = ""


class StatusFile:
    """The file; `path` is what a worker opens it by, or "" where there is none."""

    def __init__(self, fd: int, path: str = "") -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def create(cls) -> StatusFile:
        """Create the run's status file; where that is impossible, one that holds nothing."""
        name = f"imagenet_unpack-{secrets.token_hex(8)}"
        try:
            fd = os.memfd_create(name, os.MFD_CLOEXEC)
        except OSError:
            return cls(-1)
        return cls(fd, f"/proc/{os.getpid()}/fd/{fd}:{name}")

    @classmethod
    def open(cls, path: str) -> StatusFile:
        """Open a run's status file in a worker; where that very file cannot be found, one that holds nothing.

        Its name is compared before it is opened: in another process namespace the path may be any file.
        """
        link, _, name = path.partition(":")
        try:
            if link and os.readlink(link).startswith(f"/memfd:{name}"):
                return cls(os.open(link, os.O_RDWR | os.O_CLOEXEC), path)
        except OSError:
            pass
        return cls(-1)

    def write(self, slot: int, progress: Progress) -> None:
        """Report on the shard in `slot`."""
        if self._fd >= 0:
            data = _SLOT.pack(progress.size_bytes, progress.images, progress.waiting.encode()[: 112 - 1])
            with suppress(OSError):
                os.pwrite(self._fd, data, slot * _SLOT.size)

    def read(self, slot: int) -> Progress:
        """Return the last report on the shard in `slot`."""
        data = b""
        if self._fd >= 0:
            with suppress(OSError):
                data = os.pread(self._fd, _SLOT.size, slot * _SLOT.size)
        if len(data) != _SLOT.size:
            return Progress()
        size_bytes, images, waiting = _SLOT.unpack(data)
        return Progress(size_bytes=size_bytes, images=images, waiting=waiting.rstrip(b"\0").decode("utf-8", "ignore"))

    def close(self) -> None:
        """Close the file; the last one to do so frees it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Monitor:
    """Reads the slots of the shards at work every `TICK_S` and reports what has changed.

    Args:
        file: the run's status file.
        advance: is called with the bytes and images since the last look; negative where a shard begins again.
        waiting: is called with what all shards at work wait for, and with None when one goes on.
    """

    def __init__(
        self, file: StatusFile, advance: Callable[[int, int], None], waiting: Callable[[str | None], None]
    ) -> None:
        self._file = file
        self._advance = advance
        self._waiting = waiting
        self._seen: dict[int, Progress] = {}
        self._reason: str | None = None
        self._lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Look at the file in a thread until the end of the block; without one where no thread can be started."""
        ended = threading.Event()

        def tick() -> None:
            while not ended.wait(TICK_S):
                self.look()

        thread = threading.Thread(target=tick, name="status", daemon=True)
        with suppress(RuntimeError):
            thread.start()
        try:
            yield
        finally:
            ended.set()
            if thread.ident is not None:
                thread.join()

    def begin(self, slot: int) -> None:
        """Watch a slot from now on: its shard is handed out."""
        with self._lock:
            self._seen[slot] = Progress()

    def end(self, slot: int) -> Progress:
        """Watch a slot no longer, and return what was reported of it."""
        with self._lock:
            return self._seen.pop(slot, Progress())

    def look(self) -> None:
        """Tell what has changed since the last look."""
        with self._lock:
            size_bytes = images = 0
            reasons = []
            for slot, seen in self._seen.items():
                now = self._file.read(slot)
                if now == Progress():  # not begun yet
                    continue
                reasons.append(now.waiting)
                size_bytes += now.size_bytes - seen.size_bytes
                images += now.images - seen.images
                self._seen[slot] = now
            if size_bytes or images:
                self._advance(size_bytes, images)
            reason = reasons[0] if reasons and all(reasons) else None
            if reason != self._reason:
                self._reason = reason
                self._waiting(reason)
