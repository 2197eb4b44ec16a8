"""Progress displays: a bar, periodic log lines, JSON lines, or nothing.

These are implementations of `reporter.Reporter`. None of them starts a thread or a timer, so lines appear when
something happens. Everything goes to the stream that was given (stderr), and a stream that cannot be written to never
ends a run.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, TextIO, cast

from imagenet_unpack.progressbar import ProgressBar
from imagenet_unpack.reporter import NullReporter, Reporter
from imagenet_unpack.text import TolerantStream, human_bytes, human_time, is_terminal, printable

ProgressKind = Literal["auto", "bar", "log", "json", "none"]
PROGRESS_KINDS: tuple[ProgressKind, ...] = ("auto", "bar", "log", "json", "none")

Clock = Callable[[], float]

LOG_EVERY_S = 10.0
JSON_EVERY_S = 1.0


class _Tally:
    """What has been done in the phase that runs: totals, counts and the time since it began."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.begin("", None, None)

    def begin(self, name: str, total_bytes: int | None, total_images: int | None) -> None:
        self.name = name
        self.total_bytes = total_bytes
        self.total_images = total_images
        self.size_bytes = 0
        self.images = 0
        self.shards = 0
        self.began_s = self._clock()

    def grow(self, nbytes: int) -> None:
        self.total_bytes = (self.total_bytes or 0) + nbytes

    def advance(self, *, nbytes: int, images: int, shards: int) -> None:
        self.size_bytes += nbytes
        self.images += images
        self.shards += shards

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self.began_s

    def line(self) -> str:
        """Return the state as one line; rates and the time left are from the whole phase."""
        elapsed_s = max(self.elapsed_s, 1e-9)
        parts = [human_bytes(self.size_bytes)]
        if self.total_bytes:
            # The total of train is an upper bound, and what is counted need not be what was announced.
            percent = min(100.0, 100 * self.size_bytes / self.total_bytes)
            parts[0] = f"{percent:.1f} % ({human_bytes(self.size_bytes)} of {human_bytes(self.total_bytes)})"
        of_images = f" of {self.total_images:,}" if self.total_images is not None else ""
        parts.append(f"{self.images:,}{of_images} images")
        parts.append(f"{self.images / elapsed_s:,.0f} images/s")
        parts.append(f"{self.size_bytes / elapsed_s / 1e6:,.1f} MB/s")
        if self.total_bytes and self.size_bytes:
            left = max(self.total_bytes - self.size_bytes, 0)
            parts.append(f"ETA {human_time(left * elapsed_s / self.size_bytes)}")
        return f"{self.name}: {', '.join(parts)}"


class LogReporter:
    """Write a line now and then, for log files of batch jobs.

    A phase is announced by one line. Lines of progress come at most every `LOG_EVERY_S` seconds, the first one that
    long after the phase began; a phase that had any ends with one more, so that the last state is seen.
    """

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._out = TolerantStream(stream)
        self._clock = clock
        self._tally = _Tally(clock)
        self._line_s = clock()
        self._wait_line_s = float("-inf")
        self._wait_shown: str | None = None
        self._lines = 0
        self._stale = False

    def phase(self, name: str, total_bytes: int | None, total_images: int | None) -> None:
        """Begin a new stretch of work."""
        self._finish()
        self._tally.begin(name, total_bytes, total_images)
        self._line_s = self._clock()
        amounts = []
        if total_bytes:
            amounts.append(human_bytes(total_bytes))
        if total_images:
            amounts.append(f"{total_images:,} images")
        self._write(f"{name}: {', '.join(amounts)}" if amounts else name)

    def grow(self, nbytes: int) -> None:
        """Make the total larger."""
        self._tally.grow(nbytes)

    def advance(self, *, nbytes: int, images: int, shards: int) -> None:
        """Count what was done."""
        self._tally.advance(nbytes=nbytes, images=images, shards=shards)
        self._stale = True
        if self._clock() - self._line_s >= LOG_EVERY_S:
            self._progress()

    def waiting(self, reason: str | None) -> None:
        """Say why the gate is closed, and that it is open again if it was said; a flapping gate fills no log."""
        if reason is None:
            if self._wait_shown is not None:
                self._write("going on")
            self._wait_shown = None
        elif reason != self._wait_shown and self._clock() - self._wait_line_s >= LOG_EVERY_S:
            self._wait_line_s = self._clock()
            self._wait_shown = reason
            self._write(f"waiting: {reason}")

    def note(self, message: str) -> None:
        """Write a line for people."""
        self._write(message)

    def close(self) -> None:
        """Write the last state, if it was not seen yet."""
        self._finish()

    def _progress(self) -> None:
        self._line_s = self._clock()
        self._lines += 1
        self._stale = False
        self._write(self._tally.line())

    def _finish(self) -> None:
        if self._lines and self._stale:
            self._progress()
        self._lines = 0
        self._stale = False

    def _write(self, line: str) -> None:
        self._out.write(printable(line) + "\n")
        self._out.flush()


class JsonReporter:
    """Write one JSON object a line: `event` is `phase`, `progress`, `waiting` or `note`.

    Progress comes at most every `JSON_EVERY_S` seconds, and once at the end of each phase. Counts are of the phase;
    `elapsed_s` is the time since it began.
    """

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._out = TolerantStream(stream)
        self._clock = clock
        self._tally = _Tally(clock)
        self._running = False
        self._line_s = clock()

    def phase(self, name: str, total_bytes: int | None, total_images: int | None) -> None:
        """Begin a new stretch of work."""
        self.close()
        self._tally.begin(name, total_bytes, total_images)
        self._running = True
        self._line_s = self._clock()
        self._write({"event": "phase", "phase": name, "total_bytes": total_bytes, "total_images": total_images})

    def grow(self, nbytes: int) -> None:
        """Make the total larger; the next progress line shows it."""
        self._tally.grow(nbytes)

    def advance(self, *, nbytes: int, images: int, shards: int) -> None:
        """Count what was done."""
        self._tally.advance(nbytes=nbytes, images=images, shards=shards)
        if self._clock() - self._line_s >= JSON_EVERY_S:
            self._progress()

    def waiting(self, reason: str | None) -> None:
        """Say why the gate is closed, or with None that it is open again."""
        self._write({"event": "waiting", "reason": reason})

    def note(self, message: str) -> None:
        """Hand on a line for people."""
        self._write({"event": "note", "message": message})

    def close(self) -> None:
        """End the phase that runs."""
        if self._running:
            self._progress()
        self._running = False

    def _progress(self) -> None:
        self._line_s = self._clock()
        tally = self._tally
        self._write(
            {
                "event": "progress",
                "phase": tally.name,
                "bytes": tally.size_bytes,
                "total_bytes": tally.total_bytes,
                "images": tally.images,
                "total_images": tally.total_images,
                "shards": tally.shards,
                "elapsed_s": round(tally.elapsed_s, 3),
            }
        )

    def _write(self, event: dict[str, object]) -> None:
        self._out.write(json.dumps(event) + "\n")
        self._out.flush()


def _bar_class() -> Any:
    """Return tqdm without its monitor thread, its lock across processes, and its settings from the environment.

    One thread of one process draws here, and every update looks at the clock by itself; the lock takes a semaphore of
    the system, which a container may lack; with an invalid `TQDM_MININTERVAL` tqdm cannot even be imported.
    """
    settings = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("TQDM_")}
    try:
        from tqdm import tqdm  # noqa: PLC0415 - only for a bar
    finally:
        os.environ.update(settings)

    class Bar(tqdm):  # type: ignore[type-arg]  # generic in its stubs only
        monitor_interval = 0

    Bar.set_lock(threading.RLock())
    return Bar


def make_reporter(kind: ProgressKind, stream: TextIO | None) -> Reporter:
    """Return the reporter for `--progress`: `auto` is a bar on a terminal and lines elsewhere.

    Args:
        kind: the option's value.
        stream: where it all goes; None (Python's `sys.stderr` when descriptor 2 was closed at the start): nowhere.
    """
    if kind == "none" or stream is None:
        return NullReporter()
    if kind == "json":
        return JsonReporter(stream)
    if kind == "bar" or (kind == "auto" and is_terminal(stream)):
        return ProgressBar(_bar_class(), cast("TextIO", TolerantStream(stream)))
    return LogReporter(stream)
