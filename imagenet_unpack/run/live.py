"""What shards at work have reached between their outcomes, as a reporter is told of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from imagenet_unpack.host.status import Board
from imagenet_unpack.model import Outcome, ShardDone, SplitName
from imagenet_unpack.reporter import Reporter

TICK_S = 0.5


class _Locked:
    """A reporter that is told by two threads, one at a time."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._lock = threading.Lock()

    def phase(self, name: str, total_bytes: int | None, total_images: int | None) -> None:
        with self._lock:
            self._reporter.phase(name, total_bytes, total_images)

    def grow(self, nbytes: int) -> None:
        with self._lock:
            self._reporter.grow(nbytes)

    def advance(self, *, nbytes: int, images: int, shards: int) -> None:
        with self._lock:
            self._reporter.advance(nbytes=nbytes, images=images, shards=shards)

    def waiting(self, reason: str | None) -> None:
        with self._lock:
            self._reporter.waiting(reason)

    def note(self, message: str) -> None:
        with self._lock:
            self._reporter.note(message)

    def close(self) -> None:
        with self._lock:
            self._reporter.close()


class Live:
    """Tells a reporter of shards at work, from the board on which this host's workers leave word.

    Attributes:
        board: where they do.
        reporter: the reporter, safe to be told by the runner too.
    """

    def __init__(self, reporter: Reporter) -> None:
        self.reporter: Reporter = _Locked(reporter)
        self.board = Board("")
        self._told: dict[str, tuple[int, int]] = {}
        self._reason: str | None = None
        self._lock = threading.Lock()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Look at the board every `TICK_S` until the end of the block."""
        self.board = Board.make()
        ended = threading.Event()

        def tick() -> None:
            while not ended.wait(TICK_S):
                self.look()

        thread = threading.Thread(target=tick, name="live", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.board.remove()

    def watch(self, split: SplitName, shards: list[str]) -> None:
        """These shards will be at work."""
        with self._lock:
            self._told |= {f"{split}/{shard}": (0, 0) for shard in shards}

    def look(self) -> None:
        """Tell what has changed since the last look."""
        with self._lock:
            nbytes = images = 0
            at_work, reasons = 0, []
            for shard, (told_bytes, told_images) in self._told.items():
                word = self.board.read(shard)
                if word.size_bytes == word.images == 0 and not word.waiting:
                    continue
                at_work += 1
                reasons += [word.waiting] if word.waiting else []
                nbytes += word.size_bytes - told_bytes
                images += word.images - told_images
                self._told[shard] = word.size_bytes, word.images
            if nbytes or images:
                self.reporter.advance(nbytes=nbytes, images=images, shards=0)
            reason = reasons[0] if reasons and len(reasons) == at_work else None
            if reason != self._reason:
                self._reason = reason
                self.reporter.waiting(reason)

    def done(self, outcome: ShardDone, size_bytes: int) -> None:
        """A shard of `size_bytes` is done."""
        told_bytes, told_images = self._forget(outcome)
        self.reporter.advance(nbytes=size_bytes - told_bytes, images=outcome.images - told_images, shards=1)

    def dropped(self, outcome: Outcome) -> None:
        """A shard was not done: what was told of it does not count."""
        told_bytes, told_images = self._forget(outcome)
        if told_bytes or told_images:
            self.reporter.advance(nbytes=-told_bytes, images=-told_images, shards=0)

    def _forget(self, outcome: Outcome) -> tuple[int, int]:
        with self._lock:
            return self._told.pop(f"{outcome.split}/{outcome.shard}", (0, 0))
