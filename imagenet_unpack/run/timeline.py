"""Timeline of a run: a small, bounded log of counts and waits, kept in the target for `report`."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.targets.paths import timeline_file

INTERVAL_S = 1.0
POINTS = 600


class Timeline:
    """Keeps how many images and bytes were extracted, and what was waited for, over time.

    At most one point a second is kept, and `POINTS` of them: when there are more, every second one is dropped and the
    interval doubled. A change of what is waited for is kept at once. Safe for calls from two threads.

    Args:
        clock: seconds, monotonic.
        wall_clock: seconds since the epoch.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self._began_s, self._began_unix_s = clock(), wall_clock()
        self._interval_s = INTERVAL_S
        self._points: list[tuple[float, int, int, str]] = []
        self._images = self._bytes = 0
        self._reason = ""
        self._lock = threading.Lock()

    def advance(self, nbytes: int, images: int) -> None:
        """Count what was extracted; negative numbers take back what a failed shard had counted."""
        with self._lock:
            if not self._points:
                self._keep()
            self._images += images
            self._bytes += nbytes
            if self._elapsed_s() - self._points[-1][0] >= self._interval_s:
                self._keep()

    def waiting(self, reason: str | None) -> None:
        """Keep why no work is going on, or that it has resumed (None)."""
        with self._lock:
            self._reason = reason or ""
            self._keep()

    def save(self, target: Path, workers: int) -> None:
        """Write the log into the target, if the run extracted anything; one that cannot be written is left out."""
        if not self._bytes:
            return
        with self._lock:
            self._keep()
        value = {
            "schema": 1,
            "began": round(self._began_unix_s),
            "elapsed_s": round(self._elapsed_s(), 3),
            "workers": workers,
            "points": self._points,
        }
        with suppress(OSError):
            Disk(durable=False).write_file(timeline_file(target), json.dumps(value).encode() + b"\n", sync=False)

    def _elapsed_s(self) -> float:
        return self._clock() - self._began_s

    def _keep(self) -> None:
        if len(self._points) >= POINTS:
            del self._points[1::2]
            self._interval_s *= 2
        self._points.append((round(self._elapsed_s(), 3), self._images, self._bytes, self._reason))
