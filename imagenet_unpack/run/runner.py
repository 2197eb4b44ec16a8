"""One run: plan, claim the target, extract what is not done, check, publish; and end in order, whatever happens.

    plan ──▶ open ──▶ queue ──▶ executor ──▶ ledger ──▶ journal ──▶ check ──▶ publish

The queue is filled as splits are planned; the ledger is the only account of what is done; `Cancel` is asked whether to
go on.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from imagenet_unpack.checking import checker, findings
from imagenet_unpack.errors import (
    CancelledError,
    ExitCode,
    MissingArchiveError,
    StoppedError,
    TargetError,
    UnpackError,
    UsageError,
    host_fault,
    reason,
)
from imagenet_unpack.extract import throttle
from imagenet_unpack.extract.extractor import read_fragment, remove_leftovers
from imagenet_unpack.extract.folders import FolderSink
from imagenet_unpack.extract.sink import Unpaced
from imagenet_unpack.extract.throttle import Limits
from imagenet_unpack.extract.worker import Settings, run_shard
from imagenet_unpack.host import resources
from imagenet_unpack.host.status import Monitor, Progress, StatusFile
from imagenet_unpack.model import (
    Layout,
    Outcome,
    Part,
    Problem,
    RunSummary,
    Shard,
    ShardDone,
    SplitName,
    SplitPlan,
)
from imagenet_unpack.planning import planner
from imagenet_unpack.reporter import LockedReporter, Reporter
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.run.executors import Executor, RunShard, ThreadExecutor
from imagenet_unpack.run.ledger import Ledger
from imagenet_unpack.run.opening import Asked, Planned, Replan, open_split
from imagenet_unpack.run.streams import MAX_WRITERS, StreamFeed
from imagenet_unpack.run.timeline import Timeline
from imagenet_unpack.targets import archivelock, consume
from imagenet_unpack.targets import split as states
from imagenet_unpack.targets.claim import Claim, claim_target, claimed
from imagenet_unpack.targets.durable import Disk, SyncMode
from imagenet_unpack.targets.paths import SplitPaths
from imagenet_unpack.targets.records import SplitRecord
from imagenet_unpack.targets.runfile import RunFile
from imagenet_unpack.targets.split import Split

DEFAULT = -1
COMMIT_S = 5.0
VAL_WAIT_S = 0.5
_STEP_S = 0.02
_PLANS_END_S = 2.0
_CONSUMED_SHARDS = 2  # a worker: of --consume, at work or waiting for the next commit


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user asked for.

    Attributes:
        target: where the tree goes; absolute.
        layout: how class folders are named.
        planners: how to plan each split asked for; raises `MissingArchiveError` where its archive is gone.
        classes: the class indices asked for, or None for all that the archives hold.
        verify: compares a plan's archive with the published digest before anything is written, or None.
        time_counts: an archive with another modification time is another archive.
        part: which part of the plan to do; the whole checks and publishes.
        restart: throw an unfinished run away first.
        limits: the rates; the thresholds that the user named, or -1 for the default of each.
        keep_mtime: give files the members' modification times.
        uncached_writes: leave no page cache behind what is written.
        force: begin even where the room on the target seems too small.
        sync: how to bring files to the disk.
        durable: wait for the disk before publishing.
        wait: wait for another run on the same target.
        repair: extract again what is damaged of published splits.
        consume: free the archives' bytes of what is journaled.
    """

    target: Path
    layout: Layout
    planners: dict[SplitName, Replan]
    classes: tuple[int, ...] | None
    verify: Callable[[SplitPlan], None] | None = None
    time_counts: bool = True
    part: Part = Part()
    restart: bool = False
    limits: Limits = Limits(free_space=DEFAULT, free_memory=DEFAULT)
    keep_mtime: bool = False
    uncached_writes: bool = False
    force: bool = False
    sync: SyncMode = "auto"
    durable: bool = True
    wait: bool = False
    repair: bool = False
    consume: bool = False


def run(options: Options, executor: Executor, reporter: Reporter, cancel: Cancel) -> RunSummary:
    """Run the whole job and return what became of it.

    Raises:
        UnpackError: it could not start.
    """
    run = _Run(options, executor, reporter, cancel)
    with cancel.watched():
        return run.run()


class _Run:
    def __init__(self, options: Options, executor: Executor, reporter: Reporter, cancel: Cancel) -> None:
        self._options = options
        self._executor = executor
        self._reporter = LockedReporter(reporter)
        self._timeline = Timeline()
        self._cancel = cancel
        self._archives = ExitStack()
        self._claims: dict[SplitName, Claim] = {}
        self._disk = Disk()
        self._ledger = Ledger(options.planners, options.part)
        self._plans: dict[SplitName, Future[Planned]] = {}
        self._queue: deque[Shard] = deque()
        self._status = StatusFile.create()
        self._monitor = Monitor(self._status, self._extracted, self._waiting)
        self._announced = False
        self._unfreed = 0  # shards handed out, and neither journaled nor failed
        self._killed = False
        self._committed_s = time.monotonic()

    def run(self) -> RunSummary:
        try:
            with ExitStack() as stack:  # what the target holds for this run is given back when the workers have ended
                try:
                    self._plan()
                    with _target_faults(self._options.target, TargetError):
                        self._claim(stack)
                        stack.push(self._archives)
                        self._open_planned()
                        run_file = self._begin_to_write(stack) if self._has_work else None
                    with _target_faults(self._options.target, StoppedError):
                        if run_file is not None:
                            self._extract(run_file)
                        self._check_and_publish()
                except UnpackError:
                    with suppress(OSError, UnpackError):  # while the target is this run's
                        self._commit()
                    raise
                finally:
                    self._executor.close()
        except CancelledError:
            pass
        except UnpackError as error:
            if not self._ledger.splits or (error.exit_code == ExitCode.CANNOT_START and not self._ledger.begun):
                raise
            return self._ledger.summary(error.exit_code, str(error))
        finally:
            self._end_planning()
            self._status.close()
            self._timeline.save(self._options.target, self._executor.workers)
        return self._ledger.outcome(self._cancel)

    def _plan(self) -> None:
        """Plan train, and val beside it.

        Where the first byte is slow, 50,000 header reads in a row take a minute: train does not wait for them. Where
        they take a moment only, val's faults are met before anything is written.
        """
        for split in self._options.planners:
            self._plans[split] = _in_background(functools.partial(self._plan_split, split))
        first_s = time.monotonic()
        for split, plan in self._plans.items():
            must = self._options.verify is not None or self._options.consume or split == next(iter(self._plans))
            while not plan.done() and (must or time.monotonic() < first_s + VAL_WAIT_S):
                self._cancel.check()
                self._cancel.wait(_STEP_S)
            self._cancel.check()
            if plan.done():
                plan.result()
            first_s = time.monotonic()
        if self._options.consume:
            for planned in [each.result() for each in self._plans.values()]:
                if isinstance(planned, SplitPlan):
                    consume.require_possible(planned)
        if self._options.verify is not None:
            for planned in [each.result() for each in self._plans.values()]:
                if isinstance(planned, SplitPlan):
                    self._options.verify(planned)

    def _end_planning(self) -> None:
        """Wait for plans that nobody needs any more: Python ends a thread in Arrow's code by aborting the process."""
        unfinished = [plan for plan in self._plans.values() if not plan.done()]
        if unfinished:
            self._cancel.request()
            wait(unfinished, _PLANS_END_S)

    def _plan_split(self, split: SplitName) -> Planned:
        """Plan a split; return the error where its archive is gone and the split is published."""
        try:
            plan = self._options.planners[split](self._options.classes)
        except MissingArchiveError as error:
            if not states.is_published(self._options.target, split):
                raise
            return error
        if plan.stream is not None and not self._options.part.whole:
            raise UsageError(f"{plan.archive.path}: a stream cannot be divided into parts: leave out --part")
        return plan

    def _claim(self, stack: ExitStack) -> None:
        """Make the target this run's until the end of `stack`; nothing is written where all is published."""
        options = self._options
        claim_target(options.target)
        self._disk = Disk.for_folder(options.target, mode=options.sync, durable=options.durable)
        pause = self._pause if options.wait else None
        for name in options.planners:
            split = Split(SplitPaths(options.target, name), self._disk)
            self._claims[name] = stack.enter_context(claimed(split, options.part, pause, restart=options.restart))

    def _begin_to_write(self, stack: ExitStack) -> Path:
        """Return the file that tells the workers to stop; from here on there are workers."""
        run_file = RunFile.create(self._options.target)
        stack.callback(lambda: None if self._killed else run_file.remove())
        stack.enter_context(self._cancel.workers(stop=run_file.stop, kill=self._kill))
        stack.enter_context(self._monitor.running())
        return run_file.path

    @property
    def _has_work(self) -> bool:
        return bool(self._queue or self._plans) or any(split.unread for split in self._ledger.splits.values())

    def _pause(self, seconds: float) -> None:
        self._cancel.wait(seconds)
        self._cancel.check()

    def _kill(self) -> None:
        self._killed = True
        self._executor.kill()

    def _open_planned(self) -> None:
        """Open every split whose plan is made, and queue its shards."""
        for split in [split for split, plan in self._plans.items() if plan.done()]:
            shards = self._open(split, self._plans.pop(split).result())
            nbytes = sum(shard.size_bytes for shard in shards)
            if self._announced:
                self._reporter.grow(nbytes)
            elif shards:
                self._reporter.phase("extracting", nbytes, None)
                self._announced = True
            self._queue.extend(shards)

    def _open(self, name: SplitName, plan: Planned) -> list[Shard]:
        """Open the staging tree of a planned split and return the shards to be done."""
        options, reporter = self._options, self._reporter
        for note in plan.notes if isinstance(plan, SplitPlan) else ():
            reporter.note(note)
        claim = self._claims[name]

        def check(record: SplitRecord, depth: findings.Depth) -> tuple[Problem, ...]:
            reporter.phase(f"checking {name}", None, record.images)
            return checker.check_published(
                claim.split.paths, record, depth=depth, workers=self._executor.workers, advance=self._checked
            ).problems

        split = open_split(
            claim,
            plan,
            options.planners[name],
            part=options.part,
            time_counts=options.time_counts,
            repair=options.repair,
            consume_archive=options.consume,
            asked=Asked(layout=options.layout, classes=options.classes),
            check=check,
            note=reporter.note,
        )
        shards = self._ledger.open(split)
        paths = dict.fromkeys(shard.archive.path for shard in shards)
        if options.consume:
            for path in paths:
                self._archives.enter_context(archivelock.exclusive(Path(path)))
        else:
            self._archives.enter_context(archivelock.shared(paths))
        self._preflight()
        return shards

    def _preflight(self) -> None:
        """Hold what is still to be written against what is free; what an unfinished run left behind is in the way."""
        splits = self._ledger.splits.values()
        room = self._room()
        if room.fault is not None and any(split.begun() for split in splits):
            for split in splits:
                for shard in split.todo:
                    sink = FolderSink(split.paths.tree, Unpaced())
                    remove_leftovers(shard, sink, split.paths.fragment(shard.id))
            room = self._room()
        if room.fault is not None:
            if not self._options.force:
                raise TargetError(f"{room.fault}: free some space, or use --force to try anyway")
            self._reporter.note(f"{room.fault}: trying anyway (--force)")

    def _room(self) -> resources.Room:
        left = [split.left() for split in self._ledger.splits.values()]
        freed = self._options.consume and consume.on_same_file_system(left, self._options.target)
        in_flight = _CONSUMED_SHARDS * self._executor.workers if freed else None
        return resources.room(self._options.target, **planner.needs(left, in_flight=in_flight))

    def _limits(self) -> Limits:
        """Put the default thresholds where the user named none."""
        limits = self._options.limits
        if limits.free_space == DEFAULT:
            room = self._room()
            mark = throttle.default_free_space(room.bytes_total, room.bytes_free, room.bytes_needed)
            limits = replace(limits, free_space=mark)
        if limits.free_memory == DEFAULT:
            limits = replace(limits, free_memory=throttle.default_free_memory(resources.memory().total))
        return limits

    def _extract(self, run_file: Path) -> None:
        """Extract all that is not done, and journal it in groups."""
        settings = Settings(
            target=str(self._options.target),
            part=self._options.part.name,
            run_file=str(run_file),
            status=self._status.path,
            limits=self._limits(),
            keep_mtime=self._options.keep_mtime,
            uncached_writes=self._options.uncached_writes,
            sync_each_file=self._disk.sync_each_file,
        )
        task = functools.partial(run_shard, settings=settings)
        try:
            self._run_shards(self._executor, self._shards(), task)
            self._extract_streams(settings, task)
        except UnpackError:
            self._cancel.request()
            with suppress(OSError, UnpackError):  # the error that ends the run is the one to report
                self._commit()
            raise
        self._commit()

    def _extract_streams(self, settings: Settings, task: RunShard) -> None:
        """Extract the splits that are read from streams."""
        splits = {name: split for name, split in self._ledger.splits.items() if split.unread}
        if not splits or self._cancel.requested:
            return
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
        writers = max(1, min(self._executor.workers, MAX_WRITERS))
        feed = StreamFeed(
            splits,
            settings,
            self._ledger,
            monitor=self._monitor,
            advance=self._extracted,
            record=self._record,
            note=self._reporter.note,
            writers=writers,
        )
        with feed:
            self._run_shards(ThreadExecutor(writers), self._streamed(feed.shards()), feed.releasing(task))
        feed.finish()

    def _streamed(self, shards: Iterator[Shard | None]) -> Iterator[Shard | None]:
        """Yield shards until the run is to end; journal what is done while a slow pipe brings none."""
        for shard in shards:
            if self._cancel.requested:
                return
            if shard is None and time.monotonic() - self._committed_s > COMMIT_S:
                self._commit()
            yield shard

    def _run_shards(self, executor: Executor, shards: Iterator[Shard | None], task: RunShard) -> None:
        for outcome in executor.run(shards, task, self._recover):
            self._record(outcome)
            if time.monotonic() - self._committed_s > COMMIT_S or self._consumable:
                self._commit()

    def _shards(self) -> Iterator[Shard | None]:
        """Yield the shards to be done, and None while a split is still being planned, until the run is to end."""
        while not self._cancel.requested:
            self._open_planned()
            if self._options.consume and self._unfreed >= _CONSUMED_SHARDS * self._executor.workers:
                yield None
            elif self._queue:
                shard = self._queue.popleft()
                self._unfreed += 1
                self._monitor.begin(shard.slot)
                yield shard
            elif self._plans:
                yield None
            else:
                return

    @property
    def _consumable(self) -> bool:
        """Whether so much is done that its space in the archives is to be freed: a shard a worker."""
        waiting = sum(len(split.uncommitted) for split in self._ledger.splits.values())
        return self._options.consume and waiting >= self._executor.workers

    def _recover(self, shard: Shard) -> ShardDone | None:
        return read_fragment(shard, self._ledger.splits[shard.split].paths.fragment(shard.id))

    def _record(self, outcome: Outcome) -> None:
        shard = self._ledger.record(outcome)
        shown = self._monitor.end(shard.slot)
        if isinstance(outcome, ShardDone):
            nbytes, images = shard.size_bytes - shown.size_bytes, outcome.images - shown.images
            self._extracted(nbytes, images, shards=1)
            for note in outcome.notes:
                self._reporter.note(note)
            return
        self._unfreed -= 1
        if shown != Progress():
            self._extracted(-shown.size_bytes, -shown.images)
        if outcome.fatal:
            self._cancel.request()
        elif outcome.kind != "stopped":
            self._reporter.note(f"{outcome.split} shard {outcome.shard} failed: {outcome.message}")

    def _commit(self) -> None:
        """Journal the shards done so far, after a sync that covers all their files and manifest fragments."""
        part, splits = self._options.part.name, self._ledger.splits
        states.commit({name: (split.target, part, split.uncommitted) for name, split in splits.items()})
        for split in splits.values():
            self._unfreed -= len(split.uncommitted)
            split.committed()
        self._committed_s = time.monotonic()

    def _check_and_publish(self) -> None:
        """Publish every split that is whole."""
        for name, split in self._ledger.splits.items():
            if self._options.part.whole and not (
                split.published or split.todo or split.unread or split.failures or self._cancel.requested
            ):
                self._reporter.phase(f"checking {name}", None, sum(done.images for done in split.done.values()))
                self._ledger.problems += split.check_and_publish(self._executor.workers, self._checked)

    def _checked(self, images: int, nbytes: int, /) -> None:
        self._cancel.check()
        self._reporter.advance(nbytes=nbytes, images=images, shards=0)

    def _extracted(self, nbytes: int, images: int, shards: int = 0) -> None:
        self._timeline.advance(nbytes, images)
        self._reporter.advance(nbytes=nbytes, images=images, shards=shards)

    def _waiting(self, reason: str | None) -> None:
        self._timeline.waiting(reason)
        self._reporter.waiting(reason)


def _in_background(task: Callable[[], Planned]) -> Future[Planned]:
    """Run a task in a thread that does not keep the program from ending."""
    future: Future[Planned] = Future()

    def work() -> None:
        try:
            future.set_result(task())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=work, name="plan", daemon=True).start()
    return future


@contextmanager
def _target_faults(target: Path, kind: type[TargetError | StoppedError]) -> Iterator[None]:
    """Turn errors that the run itself meets (locks, sync, journal, rename) into errors of the target or the host."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        host = host_fault(error)
        if host is not None:
            raise host from error
        if not isinstance(error, OSError):
            raise
        where = error.filename or target
        raise kind(f"{where}: {reason(error)}: fix this, then run the same command again to continue") from error
