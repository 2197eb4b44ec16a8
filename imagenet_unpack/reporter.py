"""What a run, a plan or a check tells while it goes on; `cli.progress` and notebooks show it, the default is silent."""

from __future__ import annotations

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
