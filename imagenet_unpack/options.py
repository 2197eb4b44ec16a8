"""The options of `unpack` and `plan` as one value, and what they mean: plans, limits, an executor.

The command line and the Python interface both build an `UnpackOptions`; nothing here prints or parses text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imagenet_unpack.errors import CancelledError, MissingArchiveError, UsageError
from imagenet_unpack.extract.throttle import DEFAULT, DEFAULT_STALL_S, Limits
from imagenet_unpack.host import pool, resources
from imagenet_unpack.model import SPLITS, Layout, Part, RunSummary, SplitName, SplitPlan, VerifyLevel
from imagenet_unpack.planning import official
from imagenet_unpack.planning.inputs import Inputs, Planner, Request, find_inputs
from imagenet_unpack.reporter import Reporter
from imagenet_unpack.run import runner
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.run.executors import WORKER_MODULE, Executor, LocalExecutor, SerialExecutor
from imagenet_unpack.run.runoptions import Options
from imagenet_unpack.sources import consumed
from imagenet_unpack.targets import journal
from imagenet_unpack.targets.durable import Disk, SyncMode
from imagenet_unpack.targets.paths import SplitPaths
from imagenet_unpack.targets.records import Durability
from imagenet_unpack.targets.split import Split
from imagenet_unpack.targets.states import is_published

ExecutorName = Literal["local", "serial", "dask"]
_USUAL_SPLITS: tuple[SplitName, ...] = ("train", "val")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpackOptions:
    """What a user asked for; each field is the command-line option of its name, with the same default.

    Attributes:
        target_dir: None: `ImageNet` in `base_dir`.
        source: archives and folders to recognise, instead of what the base folder holds.
        splits: None: train and val, as far as their archives are there.
        first: None: val with `durability` none, else all splits are published at the end.
        classes: what `--classes` takes, or None for all.
        workers: None: the CPUs that this job may use.
        max_read_rate, max_write_rate: bytes per second; 0: no limit.
        max_create_rate: files per second; 0: no limit.
        rate_dir: None: the rates are shared by all runs of this user on a host.
        min_free_space, min_free_memory: bytes as an int, a share of the whole as a float below 1; None: the default.
        stall_timeout: seconds.
    """

    base_dir: Path = Path()
    target_dir: Path | None = None
    train_archive: Path | None = None
    val_archive: Path | None = None
    test_archive: Path | None = None
    source: tuple[Path, ...] = ()
    class_index: Path | None = None
    val_labels: Path | None = None
    splits: tuple[SplitName, ...] | None = None
    first: SplitName | None = None
    classes: str | None = None
    any_wnids: bool = False
    layout: Layout = "index"
    workers: int | None = None
    executor: ExecutorName = "local"
    dask_scheduler: str | None = None
    dask_scheduler_file: Path | None = None
    part: Part = Part()
    verify_archives: VerifyLevel = "size"
    max_read_rate: float = 0.0
    max_write_rate: float = 0.0
    max_create_rate: float = 0.0
    rate_dir: Path | None = None
    min_free_space: float | None = None
    min_free_memory: float | None = None
    stall_timeout: float = DEFAULT_STALL_S
    uncached_writes: bool = False
    keep_mtime: bool = False
    same_archive: bool = False
    repair: bool = False
    consume: bool = False
    yes: bool = False
    wait: bool = False
    durability: Durability = "disk"
    sync: SyncMode = "auto"
    restart: bool = False
    force: bool = False

    @property
    def target(self) -> Path:
        """The folder where the tree goes, absolute."""
        return (self.target_dir or self.base_dir / "ImageNet").absolute()


def inputs(options: UnpackOptions, check: Callable[[], None] = lambda: None) -> Inputs:
    """Find archives and label files, and return how to plan each split.

    Args:
        options: what was asked for.
        check: is called now and then, and may raise to end the search.

    Raises:
        ArchiveError: an archive is missing, is something else, or two hold one split.
        LabelError: a label file is missing or damaged.
        UsageError: options contradict each other, or a class is unknown.
    """
    named: dict[SplitName, Path | None] = {
        "train": options.train_archive,
        "val": options.val_archive,
        "test": options.test_archive,
    }
    return find_inputs(
        Request(
            base_dir=options.base_dir,
            archives={split: path for split, path in named.items() if path is not None},
            sources=options.source,
            class_index=options.class_index,
            val_labels=options.val_labels,
            splits=options.splits,
            classes=options.classes,
            any_wnids=options.any_wnids,
            layout=options.layout,
            verify=options.verify_archives,
            published=tuple(split for split in SPLITS if is_published(options.target, split)),
        ),
        check,
    )


def limits(options: UnpackOptions) -> Limits:
    """Turn shares into bytes of the target's file system and of this job's memory.

    Raises:
        UsageError: the folder for the rates does not exist.
    """
    if options.rate_dir is not None and not options.rate_dir.is_dir():
        raise UsageError(f"--rate-dir {options.rate_dir} is no folder: name a local one that exists")

    def threshold(given: float | None, total: int) -> int:
        if given is None:
            return DEFAULT
        return round(given * total) if isinstance(given, float) else given

    return Limits(
        free_space=threshold(
            options.min_free_space, resources.room(options.target, content_bytes=0, files=0).bytes_total
        ),
        free_memory=threshold(options.min_free_memory, resources.memory().total),
        read_rate=options.max_read_rate,
        write_rate=options.max_write_rate,
        create_rate=options.max_create_rate,
        rate_dir="" if options.rate_dir is None else str(options.rate_dir.absolute()),
        stall_timeout_s=options.stall_timeout,
    )


def make_executor(options: UnpackOptions, reporter: Reporter) -> Executor:
    """Return what is to run the shards.

    Raises:
        UsageError: options contradict each other, or the extra [dask] is missing.
    """
    _require_scheduler(options)
    if options.executor == "dask":
        from imagenet_unpack.run.dask_executor import DaskExecutor  # noqa: PLC0415 - half a second, and an extra

        file = None if options.dask_scheduler_file is None else str(options.dask_scheduler_file)
        return DaskExecutor(options.dask_scheduler, file, stall_timeout_s=options.stall_timeout)
    if options.executor == "serial":
        return SerialExecutor()
    workers = resources.worker_count(options.workers)
    if options.workers is not None and workers < options.workers:
        reporter.note(f"memory allows only {workers} of {options.workers} workers")
    if not all(is_published(options.target, split) for split in options.splits or _USUAL_SPLITS):
        pool.start_server(WORKER_MODULE)  # gets ready while the archives are planned
    return LocalExecutor(workers)


def _require_scheduler(options: UnpackOptions) -> None:
    given = options.dask_scheduler is not None or options.dask_scheduler_file is not None
    if options.executor == "dask" and not given:
        raise UsageError("--executor dask needs --dask-scheduler or --dask-scheduler-file")
    if options.executor != "dask" and given:
        raise UsageError("--dask-scheduler and --dask-scheduler-file need --executor dask")


def require_consistent(options: UnpackOptions) -> None:
    """Verify, without a look at any file, that the options of a run go together.

    Raises:
        UsageError: they contradict each other.
    """
    _require_scheduler(options)
    if options.restart and not options.part.whole:
        raise UsageError("--restart would discard the work of the other parts: run once with --part 0/1 --restart")
    if options.repair and not options.part.whole:
        raise UsageError("--repair is for one run: leave out --part")
    if options.durability == "none" and not options.part.whole:
        raise UsageError("--durability none is for one run on one node: leave out --part")
    if options.consume:
        if not options.part.whole or options.durability == "none" or options.sync == "fs" or options.repair:
            raise UsageError(
                "--consume is for one durable run: leave out --part, --durability none, --sync fs and --repair"
            )
        if not options.yes:
            raise UsageError("--consume destroys the archives as it goes: add --yes to confirm")


def run(options: UnpackOptions, executor: Executor, reporter: Reporter, cancel: Cancel) -> RunSummary:
    """Plan, extract, check and publish.

    Raises:
        UnpackError: the run could not start.
    """
    require_consistent(options)
    try:
        found = inputs(options, cancel.check)
    except CancelledError:
        return RunSummary(
            exit_code=cancel.exit_code, splits={}, message="stopped before anything was begun: run the command again"
        )
    if options.first is not None and options.first not in found.planners:
        raise UsageError(f"--first {options.first}: this run has only {', '.join(found.planners)}: see --splits")
    with closing(found):
        return runner.run(
            Options(
                target=options.target,
                layout=options.layout,
                planners=found.planners,
                classes=found.classes,
                verify=(lambda plan: verify(options, plan, reporter, cancel.check))
                if options.verify_archives == "digest"
                else None,
                time_counts=options.verify_archives != "digest" and not options.same_archive,
                sync=options.sync,
                durable=options.durability == "disk",
                wait=options.wait,
                repair=options.repair,
                consume=options.consume,
                part=options.part,
                first=options.first or ("val" if options.durability == "none" else None),
                restart=options.restart,
                limits=limits(options),
                keep_mtime=options.keep_mtime,
                uncached_writes=options.uncached_writes,
                force=options.force,
            ),
            executor,
            reporter,
            cancel,
        )


def verify(
    options: UnpackOptions, plan: SplitPlan, reporter: Reporter, check: Callable[[], None] = lambda: None
) -> None:
    """Compare a plan's archive with the published digest if `verify_archives` asks for it.

    Args:
        options: the options.
        plan: of one split.
        reporter: shows the progress.
        check: called now and then; may raise to end it.

    Raises:
        ArchiveError: it is another archive.
    """
    if options.verify_archives != "digest":
        return

    def advance(nbytes: int) -> None:
        check()
        reporter.advance(nbytes=nbytes, images=0, shards=0)

    reporter.phase(f"verifying {plan.archive.path}", plan.archive.size_bytes, None)
    official.verify_digest(plan, advance)


def plan_splits(options: UnpackOptions, reporter: Reporter) -> dict[SplitName, tuple[SplitPlan, SplitPlan]]:
    """Plan every split asked for: all of it, and what of it is neither published nor finished in an unfinished run.

    Raises:
        UnpackError: an archive or a label file is missing or damaged, or a record in the target is.
    """
    plans = {}
    with closing(inputs(options)) as found:
        for split, planner in found.planners.items():
            try:
                plan = planner(found.classes)
            except MissingArchiveError as error:
                paths = SplitPaths(options.target, split)
                published = Split(paths, Disk())
                published.look()
                if published.record is None:
                    raise
                reporter.note(
                    f"{split} is published already and left out of this plan, as its archive is gone: {error}"
                )
                continue
            plans[split] = plan, _left(options.target, plan, planner)
            verify(options, plan, reporter)
    return plans


def _left(target: Path, plan: SplitPlan, replan: Planner) -> SplitPlan:
    """Return what of a plan is still to be written to a target; reads only."""
    paths = SplitPaths(target, plan.split)
    split = Split(paths, Disk())
    split.look()
    if split.record is not None:
        missing = split.record.lacks(plan)
        plan = replan(missing) if missing else plan.subset(())
    done = journal.read(paths.home, plan.split) if split.found.plan is not None else {}
    if plan.stream is not None:
        return plan.without_bytes(sum(shard.size_bytes for shard in done.values()))
    left = plan.subset(tuple(shard for shard in plan.shards if shard.id not in done))
    consumed.require_there(shard for shard in left.shards if shard.format == "tar")  # a look at headers, as the plan
    return left


def class_spec(classes: str | int | Iterable[int | str]) -> str:
    """Return class indices and wnids in the form of `--classes`."""
    if isinstance(classes, (str, int)):
        return str(classes)
    return ",".join(map(str, classes))
