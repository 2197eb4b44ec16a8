"""The protocol by which a run, a plan or a check reports its progress, with a silent default."""

from __future__ import annotations

import threading
from typing import Protocol


class Reporter(Protocol):
    """Receives the progress of a run. Calls come from one thread at a time and must not raise."""

    def phase(self, name: str, total_bytes: int | None, total_images: int | None) -> None:
        """Begin a phase of the run; a total is None where it is not known or not counted."""

    def grow(self, nbytes: int) -> None:
        """Add to the total of the current phase."""

    def advance(self, *, nbytes: int, images: int, shards: int) -> None:
        """Count finished work; negative numbers take back what a failed shard had counted."""

    def waiting(self, reason: str | None) -> None:
        """Say why no work is going on, or that it has resumed (None)."""

    def note(self, message: str) -> None:
        """Show a line that people should read."""

    def close(self) -> None:
        """End the display."""


class NullReporter:
    """Shows nothing."""

    def phase(self, name: str, total_bytes: int | None, total_images: int | None) -> None:
        """Do nothing."""

    def grow(self, nbytes: int) -> None:
        """Do nothing."""

    def advance(self, *, nbytes: int, images: int, shards: int) -> None:
        """Do nothing."""

    def waiting(self, reason: str | None) -> None:
        """Do nothing."""

    def note(self, message: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class LockedReporter:
    """A reporter for calls from two threads, one at a time."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._lock = threading.Lock()

    def phase(self, name: str, total_bytes: int | None, total_images: int | None) -> None:
        """See `Reporter.phase`."""
        with self._lock:
            self._reporter.phase(name, total_bytes, total_images)

    def grow(self, nbytes: int) -> None:
        """See `Reporter.grow`."""
        with self._lock:
            self._reporter.grow(nbytes)

    def advance(self, *, nbytes: int, images: int, shards: int) -> None:
        """See `Reporter.advance`."""
        with self._lock:
            self._reporter.advance(nbytes=nbytes, images=images, shards=shards)

    def waiting(self, reason: str | None) -> None:
        """See `Reporter.waiting`."""
        with self._lock:
            self._reporter.waiting(reason)

    def note(self, message: str) -> None:
        """See `Reporter.note`."""
        with self._lock:
            self._reporter.note(message)

    def close(self) -> None:
        """See `Reporter.close`."""
        with self._lock:
            self._reporter.close()
