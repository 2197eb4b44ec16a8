"""Checks and publishes the splits of a run: all at its end, or each as soon as it is whole.

A split that becomes whole while others are still extracted is published in a thread beside them, by a check in this
process alone: the workers are busy. Nothing is published before every split is planned, so that a damaged archive
leaves nothing behind.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from concurrent.futures import Future, wait

from imagenet_unpack.model import Problem, SplitName
from imagenet_unpack.reporter import Reporter
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.run.ledger import Ledger
from imagenet_unpack.run.plans import in_background
from imagenet_unpack.run.splitrun import SplitRun
from imagenet_unpack.targets.claim import Claim
from imagenet_unpack.text import counted, human_bytes, human_time


class Publishing:
    """Publishes what is whole.

    Args:
        ledger: has the splits.
        claims: the locks on each split; given back as soon as a split is published while others are extracted.
        early: publish each split as soon as it is whole.
        reporter: shows the progress.
        cancel: is asked whether to go on.
    """

    def __init__(
        self, ledger: Ledger, claims: Mapping[SplitName, Claim], *, early: bool, reporter: Reporter, cancel: Cancel
    ) -> None:
        self._ledger = ledger
        self._claims = claims
        self._early = early
        self._reporter = reporter
        self._cancel = cancel
        self._began_s = time.monotonic()
        self._begun: dict[SplitName, Future[tuple[Problem, ...]]] = {}

    def due(self) -> list[SplitName]:
        """Return the splits that are whole and can be published while others are extracted.

        Raises:
            UnpackError: a split could not be published.
        """
        for future in self._begun.values():
            if future.done():
                future.result()
        splits = self._ledger.splits
        if not (self._early and self._ledger.all_open) or self._cancel.requested:
            return []
        if not any(split.unread or split.todo for split in splits.values()):
            return []
        whole = [name for name, split in splits.items() if split.whole and split.damage is None]
        return [name for name in whole if name not in self._begun]

    def begin(self, name: SplitName) -> None:
        """Check and publish a split, all of which is journaled, in a thread."""
        self._begun[name] = in_background("publish", functools.partial(self._publish_beside, name))

    def finish(self, workers: int) -> None:
        """Wait for the splits that are being published, and publish the others that are whole.

        Raises:
            UnpackError: a split could not be published.
            CancelledError: the run is to end.
        """
        for future in self._begun.values():
            self._ledger.problems += future.result()
        for name, split in self._ledger.splits.items():
            if name not in self._begun and split.whole and not self._cancel.requested:
                self._reporter.phase(f"checking {name}", None, split.staged_images)
                self._ledger.problems += split.check_and_publish(workers, self._checked)
                self._tell(name, split)

    def close(self) -> None:
        """Wait for the threads, as what they write is this run's for so long; never raises."""
        wait(self._begun.values())

    def _publish_beside(self, name: SplitName) -> tuple[Problem, ...]:
        split = self._ledger.splits[name]
        problems = split.check_and_publish(1, lambda _images, _nbytes: self._cancel.check())
        if split.published:
            self._claims[name].close()
            self._tell(name, split)
        return problems

    def _tell(self, name: SplitName, split: SplitRun) -> None:
        if self._early and split.published:
            done = split.summary()
            what = f"{counted(done.images, 'image')}, {human_bytes(done.size_bytes)}"
            self._reporter.note(f"{name} is published after {human_time(time.monotonic() - self._began_s)}: {what}")

    def _checked(self, images: int, nbytes: int, /) -> None:
        self._cancel.check()
        self._reporter.advance(nbytes=nbytes, images=images, shards=0)
