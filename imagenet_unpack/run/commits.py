"""Group commit: shards that are done are journaled together, after a sync that covers all that they wrote."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from imagenet_unpack.model import ShardDone, SplitName
from imagenet_unpack.run.ledger import Ledger
from imagenet_unpack.run.plans import in_background
from imagenet_unpack.targets import split as states
from imagenet_unpack.targets.split import Split

COMMIT_S = 1.0

_Done = Mapping[SplitName, tuple[Split, str, Sequence[ShardDone]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sync:
    """A sync that goes on in a thread, and the shards that were done before it began."""

    done: _Done
    ended: Future[None]


class Commits:
    """Journals what is done.

    Attributes:
        journaled: how many shards have been journaled.

    Args:
        ledger: has the splits.
        part: name of the run's part.
        interval_s: how long after one sync the next one begins.
    """

    def __init__(self, ledger: Ledger, part: str, *, interval_s: float | None = None) -> None:
        self._ledger = ledger
        self._part = part
        self._interval_s = COMMIT_S if interval_s is None else interval_s
        self.journaled = 0
        self._sync: _Sync | None = None
        self._committed_s = time.monotonic()

    @property
    def waiting(self) -> int:
        """How many shards are done and not journaled."""
        return sum(len(split.uncommitted) for split in self._ledger.splits.values())

    def advance(self, *, now: bool = False) -> None:
        """Begin a sync in a thread when one is due, or journal what the last one covered; never waits for the disk.

        So workers get their next shards meanwhile, and streams the memory of those that are written.

        Args:
            now: one is due whenever anything is not journaled.

        Raises:
            StoppedError: another run has taken the target over.
            OSError: the target failed.
        """
        if self._sync is not None:
            if self._sync.ended.done():
                self._end_sync()
        elif (now or time.monotonic() - self._committed_s >= self._interval_s) and (done := self._uncommitted()):
            split, _, _ = next(iter(done.values()))
            sync = functools.partial(split.disk.sync_all, split.paths.home)
            self._sync = _Sync(done=done, ended=in_background("sync", sync))

    def commit(self) -> None:
        """Journal all that is done; errors as in `advance`."""
        self._end_sync()
        done = self._uncommitted()
        states.commit(done)
        self._journaled(done)

    def _uncommitted(self) -> _Done:
        return {
            name: (split.target, self._part, tuple(split.uncommitted))
            for name, split in self._ledger.splits.items()
            if split.uncommitted
        }

    def _end_sync(self) -> None:
        """Wait for the sync that goes on, if one does, and journal what it covered."""
        sync, self._sync = self._sync, None
        if sync is not None:
            sync.ended.result()
            states.journal_synced(sync.done)
            self._journaled(sync.done)

    def _journaled(self, done: _Done) -> None:
        for name, (_, _, shards) in done.items():
            self._ledger.splits[name].committed(len(shards))
            self.journaled += len(shards)
        self._committed_s = time.monotonic()
