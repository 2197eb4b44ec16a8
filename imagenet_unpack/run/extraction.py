"""The loop of a run: shards to the executor, outcomes into the ledger, and a group of them into the journal."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from imagenet_unpack.errors import UnpackError
from imagenet_unpack.extract.extractor import read_fragment
from imagenet_unpack.extract.worker import Settings, run_shard
from imagenet_unpack.host.status import Monitor, Progress, StatusFile
from imagenet_unpack.model import Outcome, Shard, ShardDone, SplitName
from imagenet_unpack.reporter import Reporter
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.run.commits import Commits
from imagenet_unpack.run.executors import Executor, RunShard, ThreadExecutor
from imagenet_unpack.run.ledger import Ledger
from imagenet_unpack.run.preflight import CONSUMED_SHARDS
from imagenet_unpack.run.publishing import Publishing
from imagenet_unpack.run.runoptions import Options
from imagenet_unpack.run.splitrun import SplitRun
from imagenet_unpack.run.streams import MAX_WRITERS, StreamFeed
from imagenet_unpack.run.timeline import Timeline


class Extraction:
    """Extracts what is not done.

    Attributes:
        monitor: watches the shards at work.
        commits: journals those that are done.

    Args:
        options: of the run.
        executor: runs the shards.
        ledger: enters what becomes of them.
        publishing: publishes what is whole meanwhile.
        reporter: shows the progress; safe to be called from several threads.
        cancel: is asked whether to go on.
    """

    def __init__(
        self,
        options: Options,
        executor: Executor,
        ledger: Ledger,
        publishing: Publishing,
        *,
        reporter: Reporter,
        cancel: Cancel,
    ) -> None:
        self._options = options
        self._executor = executor
        self._ledger = ledger
        self._publishing = publishing
        self._reporter = reporter
        self._cancel = cancel
        self._timeline = Timeline()
        self._status = StatusFile.create()
        self.monitor = Monitor(self._status, self._extracted, self._waiting)
        self._queue: deque[Shard] = deque()
        self._open_planned: Callable[[], bool] = bool
        self._streamed: set[SplitName] = set()
        self._announced = False
        self._handed_out = 0  # shards of archives; those that failed are taken off again
        self.commits = Commits(ledger, options.part.name, interval_s=options.commit_s)

    def close(self) -> None:
        """Keep the timeline of what was extracted; never raises."""
        self._status.close()
        self._timeline.save(self._options.target, self._executor.workers)

    def add(self, shards: Sequence[Shard]) -> None:
        """Queue the shards of one split; those of the split that is to be first go before all others."""
        nbytes = sum(shard.size_bytes for shard in shards)
        if self._announced:
            self._reporter.grow(nbytes)
        elif shards:
            self._reporter.phase("extracting", nbytes, None)
            self._announced = True
        if shards and shards[0].split == self._options.first:
            self._queue.extendleft(reversed(shards))
        else:
            self._queue.extend(shards)

    @property
    def has_work(self) -> bool:
        """Whether anything is known that is to be done."""
        return bool(self._queue) or any(split.unread for split in self._ledger.splits.values())

    def run(self, settings: Settings, open_planned: Callable[[], bool]) -> None:
        """Extract all that is not done, and journal it in groups.

        Args:
            settings: of every shard.
            open_planned: adds the shards of the splits that were planned since; False: all splits are planned.

        Raises:
            UnpackError: the run has to end; what is done is journaled.
        """
        self._open_planned = open_planned
        settings = replace(settings, status=self._status.path)
        task = functools.partial(run_shard, settings=settings)
        first = self._ledger.splits.get(self._options.first) if self._options.first is not None else None
        try:
            if first is not None and first.unread:
                self._run_streams(settings, task)
            self._run_shards(self._executor, self._shards(), task)
            self._run_streams(settings, task)
        except UnpackError:
            self._cancel.request()
            with suppress(OSError, UnpackError):  # the error that ends the run is the one to report
                self.commits.commit()
            raise
        self.commits.commit()

    def _run_shards(self, executor: Executor, shards: Iterator[Shard | None], task: RunShard) -> None:
        self._publish_whole()
        for outcome in executor.run(shards, task, self._recover):
            self._record(outcome)
            self._publish_whole()
            if self._options.consume and self.commits.waiting >= self._executor.workers:
                self.commits.commit()  # frees their space in the archives
            else:
                self.commits.advance()

    def _publish_whole(self) -> None:
        """Publish what is whole beside the extraction of the rest."""
        due = self._publishing.due()
        if due and not self._options.durable:  # which takes no time
            self.commits.commit()
        elif any(self._ledger.splits[name].uncommitted for name in due):
            self.commits.advance(now=True)
        for name in due:
            if not self._ledger.splits[name].uncommitted:
                self._publishing.begin(name)

    def _shards(self) -> Iterator[Shard | None]:
        """Yield the shards to be done, and None while a split is still being planned, until the run is to end."""
        while not self._cancel.requested:
            planning = self._open_planned()
            unfreed = self._handed_out - self.commits.journaled
            if self._options.consume and unfreed >= CONSUMED_SHARDS * self._executor.workers:
                yield None
            elif self._queue:
                shard = self._queue.popleft()
                self._handed_out += 1
                self.monitor.begin(shard.slot)
                yield shard
            elif planning:
                yield None
            else:
                return

    def _run_streams(self, settings: Settings, task: RunShard) -> None:
        """Extract the splits that are read from streams."""
        unread = {name: split for name, split in self._ledger.splits.items() if split.unread}
        splits = {name: unread[name] for name in sorted(unread, key=lambda name: name != self._options.first)}
        splits = {name: split for name, split in splits.items() if name not in self._streamed}
        if not splits or self._cancel.requested:
            return
        self._streamed.update(splits)
        self._tell_of_shared_streams(splits)
        sizes = {
            source.archive.path: source.archive.size_bytes
            for split in splits.values()
            if split.plan.stream is not None
            for source in split.plan.stream.sources
        }
        if self._announced:
            self._reporter.grow(sum(sizes.values()))
        else:
            self._reporter.phase("extracting", sum(sizes.values()) if all(sizes.values()) else None, None)
            self._announced = True
        writers = max(1, min(self._executor.workers, MAX_WRITERS))
        feed = StreamFeed(
            splits,
            settings,
            self._ledger,
            monitor=self.monitor,
            advance=self._extracted,
            record=self._record,
            note=self._reporter.note,
            writers=writers,
        )
        with feed:
            self._run_shards(ThreadExecutor(writers), self._from_streams(feed), feed.releasing(task))
        feed.finish()

    def _tell_of_shared_streams(self, splits: Mapping[SplitName, SplitRun]) -> None:
        """Say why a split that is to be first is not: its images are mixed with others'."""
        paths = {
            name: {source.archive.path for source in split.plan.stream.sources}
            for name, split in splits.items()
            if split.plan.stream is not None
        }
        first = self._options.first
        for name, its_paths in paths.items():
            if first in paths and name != first and (shared := paths[first] & its_paths):
                self._reporter.note(
                    f"{min(shared)} holds {first} and {name} and is read from front to back: {first} is published when "
                    "it has been read to the end"
                )

    def _from_streams(self, feed: StreamFeed) -> Iterator[Shard | None]:
        """Yield shards until the run is to end; journal what is done while a slow pipe brings none."""
        for shard in feed.shards():
            if self._cancel.requested:
                return
            feed.finish(whole_only=True)
            self._publish_whole()
            if shard is None:
                self.commits.advance()
            yield shard

    def _recover(self, shard: Shard) -> ShardDone | None:
        return read_fragment(shard, self._ledger.splits[shard.split].paths.fragment(shard.id))

    def _record(self, outcome: Outcome) -> None:
        shard = self._ledger.record(outcome)
        shown = self.monitor.end(shard.slot)
        if isinstance(outcome, ShardDone):
            nbytes, images = shard.size_bytes - shown.size_bytes, outcome.images - shown.images
            self._extracted(nbytes, images, shards=1)
            for note in outcome.notes:
                self._reporter.note(note)
            return
        self._handed_out -= 1
        if shown != Progress():
            self._extracted(-shown.size_bytes, -shown.images)
        if outcome.fatal:
            self._cancel.request()
        elif outcome.kind != "stopped":
            self._reporter.note(f"{outcome.split} shard {outcome.shard} failed: {outcome.message}")

    def _extracted(self, nbytes: int, images: int, shards: int = 0) -> None:
        self._timeline.advance(nbytes, images)
        self._reporter.advance(nbytes=nbytes, images=images, shards=shards)

    def _waiting(self, reason: str | None) -> None:
        self._timeline.waiting(reason)
        self._reporter.waiting(reason)
