"""One run: plan, claim the target, extract what is not done, check, publish; and end in order, whatever happens.

    plan ──▶ open ──▶ queue ──▶ executor ──▶ ledger ──▶ journal ──▶ check ──▶ publish

The queue is filled as splits are planned; the ledger is the only account of what is done; `Cancel` is asked whether to
go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from imagenet_unpack.checking import checker, findings
from imagenet_unpack.errors import (
    CancelledError,
    ExitCode,
    StoppedError,
    TargetError,
    UnpackError,
    host_fault,
    reason,
)
from imagenet_unpack.extract.worker import Settings
from imagenet_unpack.model import Problem, RunSummary, Shard, SplitName, SplitPlan
from imagenet_unpack.reporter import LockedReporter, Reporter
from imagenet_unpack.run import preflight
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.run.executors import Executor
from imagenet_unpack.run.extraction import Extraction
from imagenet_unpack.run.ledger import Ledger
from imagenet_unpack.run.opening import Planned, open_split
from imagenet_unpack.run.plans import Plans
from imagenet_unpack.run.publishing import Publishing
from imagenet_unpack.run.runoptions import Options
from imagenet_unpack.targets import archivelock
from imagenet_unpack.targets.claim import Claim, claim_target, claimed
from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.targets.paths import SplitPaths
from imagenet_unpack.targets.records import SplitRecord
from imagenet_unpack.targets.runfile import RunFile
from imagenet_unpack.targets.split import Split


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
        self._cancel = cancel
        self._archives = ExitStack()
        self._locked: set[str] = set()  # archives
        self._claims: dict[SplitName, Claim] = {}
        self._disk = Disk()
        self._ledger = Ledger(options.planners, options.part)
        self._plans = Plans(options, cancel)
        self._publishing = Publishing(
            self._ledger, self._claims, early=options.first is not None, reporter=self._reporter, cancel=cancel
        )
        self._extraction = Extraction(
            options, executor, self._ledger, self._publishing, reporter=self._reporter, cancel=cancel
        )
        self._killed = False

    def run(self) -> RunSummary:
        try:
            with ExitStack() as stack:  # what the target holds for this run is given back when the workers have ended
                try:
                    self._plans.make()
                    with _target_faults(self._options.target, TargetError):
                        self._claim(stack)
                        stack.push(self._archives)
                        stack.callback(self._publishing.close)
                        self._open_planned()
                        run_file = self._begin_to_write(stack) if self._has_work else None
                    with _target_faults(self._options.target, StoppedError):
                        if run_file is not None:
                            self._extraction.run(self._settings(run_file), self._open_planned)
                        self._publishing.finish(self._executor.workers)
                except UnpackError:
                    with suppress(OSError, UnpackError):  # while the target is this run's
                        self._extraction.commits.commit()
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
            self._plans.end()
            self._extraction.close()
        return self._ledger.outcome(self._cancel)

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
        stack.enter_context(self._extraction.monitor.running())
        return run_file.path

    @property
    def _has_work(self) -> bool:
        return self._plans.pending or self._extraction.has_work

    def _pause(self, seconds: float) -> None:
        self._cancel.wait(seconds)
        self._cancel.check()

    def _kill(self) -> None:
        self._killed = True
        self._executor.kill()

    def _open_planned(self) -> bool:
        """Open every split whose plan is made, and queue its shards; return whether more are being planned."""
        for split, planned in self._plans.take():
            self._extraction.add(self._open(split, planned))
        return self._plans.pending

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

        split = open_split(claim, plan, options, check=check, note=reporter.note)
        shards = self._ledger.open(split)
        if shards:
            self._lock_archives(split.plan)
        preflight.require_room(options, self._ledger.splits.values(), self._executor.workers, reporter.note)
        return shards

    def _lock_archives(self, plan: SplitPlan) -> None:
        """Keep other runs from changing what this one reads, or from reading what it changes."""
        paths = {archive.path for archive in plan.files or (plan.archive,)} - self._locked  # a zip holds several splits
        self._locked |= paths
        lock = archivelock.all_exclusive if self._options.consume else archivelock.shared
        self._archives.enter_context(lock(sorted(paths)))

    def _checked(self, images: int, nbytes: int, /) -> None:
        self._cancel.check()
        self._reporter.advance(nbytes=nbytes, images=images, shards=0)

    def _settings(self, run_file: Path) -> Settings:
        """Return what every shard of this run shares."""
        options = self._options
        return Settings(
            target=str(options.target),
            part=options.part.name,
            run_file=str(run_file),
            limits=preflight.limits(options, self._ledger.splits.values(), self._executor.workers),
            keep_mtime=options.keep_mtime,
            uncached_writes=options.uncached_writes,
            sync_each_file=self._disk.sync_each_file,
        )


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
