"""Drives one run: plan, open the staging trees, extract, commit to the journal, check, publish; and ends in order."""

from __future__ import annotations

import functools
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from imagenet_unpack.checking import checker
from imagenet_unpack.errors import ExitCode, StoppedError, TargetError, UnpackError
from imagenet_unpack.extract import throttle
from imagenet_unpack.extract.extractor import read_fragment, remove_leftovers
from imagenet_unpack.extract.folders import FolderSink
from imagenet_unpack.extract.sink import Unpaced
from imagenet_unpack.extract.throttle import Limits
from imagenet_unpack.extract.worker import Settings, run_shard
from imagenet_unpack.host import resources
from imagenet_unpack.model import (
    Outcome,
    Part,
    Problem,
    RunSummary,
    Shard,
    ShardDone,
    ShardFailed,
    SplitName,
    SplitPlan,
)
from imagenet_unpack.planning import planner
from imagenet_unpack.reporter import Reporter
from imagenet_unpack.run.executors import Executor
from imagenet_unpack.run.live import Live
from imagenet_unpack.run.splitrun import Replan, SplitRun, open_split
from imagenet_unpack.targets import split as states
from imagenet_unpack.targets.claim import Claim, claim_target, claimed
from imagenet_unpack.targets.durable import Disk, SyncMode
from imagenet_unpack.targets.paths import STATE_FOLDER, SplitPaths
from imagenet_unpack.targets.records import SplitRecord
from imagenet_unpack.targets.split import Split

DEFAULT = -1
COMMIT_S = 5.0
VAL_WAIT_S = 1.0
GRACE_S = 7.0
_STEP_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user asked for.

    Attributes:
        target: where the tree goes; absolute.
        planners: how to plan each split asked for.
        classes: the class indices asked for, or None for all that the archives hold.
        verify: holds a plan's archive against the published facts.
        time_counts: an archive with another modification time is another archive.
        part: which part of the plan to do; the whole checks and publishes.
        restart: throw an unfinished run away first.
        limits: the rates; the marks that the user named, or -1 for the default of each.
        keep_mtime: give files the members' modification times.
        uncached_writes: leave no page cache behind what is written.
        force: begin even where the room on the target seems too small.
        sync: how to bring files to the disk.
        durable: wait for the disk before publishing.
        wait: wait for another run on the same target.
    """

    target: Path
    planners: dict[SplitName, Replan]
    classes: tuple[int, ...] | None
    verify: Callable[[SplitPlan], None]
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


class InterruptedRunError(Exception):
    """A signal came while nothing was going on that must be ended in order."""


class StopRequest:
    """A wish to end the run, made from a signal handler: keeps the signal's number and removes the run's token."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._interruptible = False
        self._grace = threading.Timer(GRACE_S, lambda: None)
        self._token: Path | None = None
        self._kill: Callable[[], None] = lambda: None

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within, a request raises `InterruptedRunError` at once: nothing goes on that must be ended in order."""
        if self.signal is not None:
            raise InterruptedRunError
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def arm(self, token: Path, kill: Callable[[], None]) -> None:
        """From now on a request also ends the workers: by the token, and after a grace by `kill`."""
        self._token, self._kill = token, kill
        if self.signal is not None:
            self.end_workers()

    def request(self, number: int) -> None:
        """Ask the run to end."""
        self.signal = number
        if self._interruptible:
            raise InterruptedRunError
        self.end_workers()

    def end_workers(self) -> None:
        """Let the workers drop what they have; kill those that cannot within the grace."""
        if self._token is not None:
            self._token.unlink(missing_ok=True)
            self._grace.cancel()
            self._grace = threading.Timer(GRACE_S, self._kill)
            self._grace.daemon = True
            self._grace.start()

    def disarm(self) -> None:
        """The workers have ended."""
        self._grace.cancel()
        self._token, self._kill = None, lambda: None


def run(options: Options, executor: Executor, reporter: Reporter, stop: StopRequest) -> RunSummary:
    """Run the whole job and return what became of it.

    Raises:
        UnpackError: it could not start.
    """
    return _Run(options, executor, reporter, stop).run()


class _Run:
    def __init__(self, options: Options, executor: Executor, reporter: Reporter, stop: StopRequest) -> None:
        self._options = options
        self._executor = executor
        self._live = Live(reporter)
        self._reporter = self._live.reporter
        self._stop = stop
        self._claims: dict[SplitName, Claim] = {}
        self._disk = Disk()
        self._splits: dict[SplitName, SplitRun] = {}
        self._shard_bytes: dict[tuple[SplitName, str], int] = {}
        self._fatal: ShardFailed | None = None
        self._last_commit = time.monotonic()

    def run(self) -> RunSummary:
        target = self._options.target
        problems: tuple[Problem, ...] = ()
        with ExitStack() as stack:
            try:
                with self._stop.interruptible():
                    train_plan, val_plan = self._plan()
                stack.callback(self._executor.close)
                with _target_faults(target, TargetError):
                    token = self._claim(stack)
                    stack.enter_context(self._live.shown())
                    if train_plan is not None:
                        self._open(train_plan)
                with _target_faults(target, StoppedError):
                    self._extract(val_plan, str(token))
                    problems = self._check_and_publish()
            except InterruptedRunError:
                pass
            except UnpackError as error:
                begun = any(split.done or split.published for split in self._splits.values())
                if not self._splits or (error.exit_code == ExitCode.CANNOT_START and not begun):
                    raise
                with suppress(OSError):
                    self._commit()
                return self._summary(error.exit_code, str(error))
        return self._outcome(problems)

    def _plan(self) -> tuple[SplitPlan | None, Future[SplitPlan] | None]:
        """Plan train, and val beside it.

        Where the first byte is slow, 50,000 header reads in a row take a minute: train does not wait for them. Where
        they take a moment only, val's faults are met before anything is written.
        """
        planners = self._options.planners
        val_plan = _in_background(lambda: self._plan_split("val")) if "val" in planners else None
        train_plan = self._plan_split("train") if "train" in planners else None
        if val_plan is not None:
            _wait(val_plan, VAL_WAIT_S if train_plan is not None else math.inf)
            if val_plan.done():
                val_plan.result()
        return train_plan, val_plan

    def _plan_split(self, split: SplitName) -> SplitPlan:
        plan = self._options.planners[split](self._options.classes)
        self._options.verify(plan)
        return plan

    def _claim(self, stack: ExitStack) -> Path:
        """Make the target this run's until the end of `stack`, and return the token that says that it goes on."""
        target = self._options.target
        options = self._options
        claim_target(target)
        self._disk = Disk.for_folder(target, mode=options.sync, durable=options.durable)
        pause = self._pause if options.wait else None
        for name in options.planners:
            split = Split(SplitPaths(target, name), self._disk)
            self._claims[name] = stack.enter_context(claimed(split, options.part, pause, restart=options.restart))
        token = target / STATE_FOLDER / f"run-{secrets.token_hex(8)}"
        token.touch()
        stack.callback(token.unlink, missing_ok=True)
        self._stop.arm(token, self._executor.kill)
        stack.callback(self._stop.disarm)
        return token

    def _pause(self, seconds: float) -> None:
        with self._stop.interruptible():
            time.sleep(seconds)

    def _open(self, plan: SplitPlan) -> list[Shard]:
        """Open the staging tree of a planned split and return the shards to be done."""
        options, reporter = self._options, self._reporter
        for note in plan.notes:
            reporter.note(note)
        claim = self._claims[plan.split]

        def check(record: SplitRecord, depth: checker.Depth) -> tuple[Problem, ...]:
            reporter.phase(f"checking {plan.split}", None, record.images)
            return checker.check_published(
                claim.split.paths, record, depth=depth, workers=self._executor.workers, advance=self._checked
            ).problems

        split = open_split(
            claim,
            plan,
            options.planners[plan.split],
            part=options.part,
            time_counts=options.time_counts,
            check=check,
            note=reporter.note,
        )
        self._splits[plan.split] = split
        self._live.watch(plan.split, [shard.id for shard in split.todo])
        self._shard_bytes |= {(plan.split, shard.id): shard.size_bytes for shard in split.todo}
        self._preflight()
        return split.todo

    def _preflight(self) -> None:
        """Hold what is still to be written against what is free; what an unfinished run left behind is in the way."""
        room = self._room()
        if room.fault is not None and any(split.begun() for split in self._splits.values()):
            for split in self._splits.values():
                for shard in split.todo:
                    sink = FolderSink(split.paths.tree, Unpaced())
                    remove_leftovers(shard, sink, split.paths.fragment(shard.id))
            room = self._room()
        if room.fault is not None:
            if not self._options.force:
                raise TargetError(f"{room.fault}: make room, or use --force to try all the same")
            self._reporter.note(f"{room.fault}: trying all the same")

    def _room(self) -> resources.Room:
        return resources.room(self._options.target, **planner.needs([split.left() for split in self._splits.values()]))

    def _limits(self) -> Limits:
        """Put the default marks where the user named none."""
        limits = self._options.limits
        if limits.free_space == DEFAULT:
            room = self._room()
            mark = throttle.default_free_space(room.bytes_total, room.bytes_free, room.bytes_needed)
            limits = replace(limits, free_space=mark)
        if limits.free_memory == DEFAULT:
            limits = replace(limits, free_memory=throttle.default_free_memory(resources.memory().total))
        return limits

    def _checked(self, images: int) -> None:
        if self._stop.signal is not None:
            raise InterruptedRunError
        self._reporter.advance(nbytes=0, images=images, shards=0)

    def _extract(self, val_plan: Future[SplitPlan] | None, token: str) -> None:
        """Extract all that is not done, and journal it in groups; val joins in as soon as it is planned."""
        queue: list[Shard] = []
        begun = False
        settings = Settings(
            target=str(self._options.target),
            part=self._options.part.name,
            token=token,
            board=self._live.board.path,
            limits=self._limits(),
            keep_mtime=self._options.keep_mtime,
            uncached_writes=self._options.uncached_writes,
            sync_each_file=self._disk.sync_each_file,
        )
        task = functools.partial(run_shard, settings=settings)

        def take(shards: list[Shard]) -> None:
            nonlocal begun
            nbytes = sum(shard.size_bytes for shard in shards)
            if begun:
                self._reporter.grow(nbytes)
            elif shards:
                self._reporter.phase("extracting", nbytes, None)
                begun = True
            queue.extend(shards)

        def take_val(*, must: bool) -> None:
            nonlocal val_plan
            if must and val_plan is not None:
                with suppress(InterruptedRunError), self._stop.interruptible():
                    _wait(val_plan, math.inf)
            if val_plan is not None and val_plan.done():
                plan, val_plan = val_plan.result(), None
                take(self._open(plan))

        def shards() -> Iterator[Shard]:
            while queue and not self._ending:
                yield queue.pop(0)

        take([shard for split in self._splits.values() for shard in split.todo])
        while True:
            take_val(must=not queue)
            if not queue or self._ending:
                break
            try:
                for outcome in self._executor.run(shards(), task, self._recover):
                    self._collect(outcome)
                    take_val(must=False)
                    if time.monotonic() - self._last_commit > COMMIT_S:
                        self._commit()
            except UnpackError:
                self._stop.end_workers()
                raise
        self._commit()

    @property
    def _ending(self) -> bool:
        return self._stop.signal is not None or self._fatal is not None

    def _recover(self, shard: Shard) -> ShardDone | None:
        return read_fragment(shard, self._splits[shard.split].paths.fragment(shard.id))

    def _collect(self, outcome: Outcome) -> None:
        split = self._splits[outcome.split]
        if isinstance(outcome, ShardDone):
            split.done[outcome.shard] = outcome
            split.uncommitted.append(outcome)
            for note in outcome.notes:
                self._reporter.note(note)
            self._live.done(outcome, self._shard_bytes[outcome.split, outcome.shard])
        else:
            self._live.dropped(outcome)
        if isinstance(outcome, ShardFailed) and outcome.fatal:  # the run's end, not the shard's failure
            if self._fatal is None:
                self._fatal = outcome
                self._stop.end_workers()
        elif isinstance(outcome, ShardFailed) and outcome.kind != "stopped":
            split.failures.append(outcome)
            self._reporter.note(f"{outcome.split} shard {outcome.shard} failed: {outcome.message}")

    def _commit(self) -> None:
        """Journal the shards done so far, after a sync that covers all their files and manifest parts."""
        part = self._options.part.name
        states.commit({name: (split.target, part, split.uncommitted) for name, split in self._splits.items()})
        for split in self._splits.values():
            split.uncommitted = []
        self._last_commit = time.monotonic()

    def _check_and_publish(self) -> tuple[Problem, ...]:
        """Publish every split that is whole, and return what a check found wrong with the others."""
        problems: list[Problem] = []
        for name, split in self._splits.items():
            if self._options.part.whole and not (split.published or split.todo or self._ending):
                self._reporter.phase(f"checking {name}", None, sum(done.images for done in split.done.values()))
                problems += split.check_and_publish(self._executor.workers, self._checked)
        return tuple(problems)

    def _outcome(self, problems: tuple[Problem, ...]) -> RunSummary:
        failures = [failure for split in self._splits.values() for failure in split.failures]
        if self._stop.signal is not None and not self._all_done:
            return self._summary(128 + self._stop.signal, "stopped by a signal: the same command continues")
        if self._fatal is not None:
            return self._summary(ExitCode.STOPPED, f"{self._fatal.message}: mend it, then the same command continues")
        if any(failure.kind == "defect" for failure in failures):
            return self._summary(ExitCode.DEFECT, "a defect of the program: please report it with the lines above")
        if failures:
            text = f"{len(failures)} shards failed: mend what they name, then the same command tries them again"
            return self._summary(ExitCode.SHARDS_FAILED, text)
        if problems:
            text = "the staged files are not those that were written: nothing of that split is published; use --restart"
            return self._summary(ExitCode.CHECK_DIFFERS, text, problems)
        return self._summary(ExitCode.OK, "")

    @property
    def _all_done(self) -> bool:
        whole = self._options.part.whole
        done = [split.published or not (whole or split.todo) for split in self._splits.values()]
        return len(done) == len(self._options.planners) and all(done)

    def _summary(self, code: int, message: str, problems: tuple[Problem, ...] = ()) -> RunSummary:
        return RunSummary(
            exit_code=code,
            splits={name: split.summary() for name, split in self._splits.items()},
            failures=(
                *(failure for split in self._splits.values() for failure in split.failures),
                *((self._fatal,) if self._fatal is not None else ()),
            ),
            problems=problems,
            message=message,
        )


def _in_background(task: Callable[[], SplitPlan]) -> Future[SplitPlan]:
    """Run a task in a thread that does not keep the program from ending."""
    future: Future[SplitPlan] = Future()

    def work() -> None:
        try:
            future.set_result(task())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=work, name="plan-val", daemon=True).start()
    return future


def _wait(future: Future[SplitPlan], timeout_s: float) -> None:
    """Wait in short steps: a signal that comes just before a long one would be seen only after it."""
    deadline_s = time.monotonic() + timeout_s
    while not future.done() and time.monotonic() < deadline_s:
        wait([future], _STEP_S)


@contextmanager
def _target_faults(target: Path, kind: type[TargetError | StoppedError]) -> Iterator[None]:
    """Turn errors of the target that the runner itself meets (locks, sync, journal, rename) into known ones."""
    try:
        yield
    except OSError as error:
        where = error.filename or target
        raise kind(f"{where}: {error.strerror}: mend it, then the same command continues") from error
