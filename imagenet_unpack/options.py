"""The options of `unpack` and `plan` as one value, and what they mean: plans, limits, an executor.

The command line and the Python interface both build an `UnpackOptions`; nothing here prints or parses text.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imagenet_unpack.dataset import ilsvrc2012, labels
from imagenet_unpack.dataset.class_index import load_class_index
from imagenet_unpack.errors import ArchiveError, UsageError
from imagenet_unpack.extract.throttle import DEFAULT_STALL_S, Limits
from imagenet_unpack.host import pool, resources
from imagenet_unpack.model import SPLITS, Layout, Part, RunSummary, SplitName, SplitPlan, class_refs
from imagenet_unpack.planning import planner
from imagenet_unpack.reporter import Reporter
from imagenet_unpack.run import runner
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.run.executors import WORKER_MODULE, Executor, LocalExecutor, SerialExecutor
from imagenet_unpack.run.splitrun import Replan
from imagenet_unpack.targets.durable import SyncMode
from imagenet_unpack.targets.records import Durability

ExecutorName = Literal["local", "serial", "dask"]
VerifyLevel = Literal["none", "size", "digest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpackOptions:
    """What a user asked for; each field is the command-line option of its name, with the same default.

    Attributes:
        target_dir: None: `ImageNet` in `base_dir`.
        splits: None: every split whose archive is there.
        classes: what `--classes` takes, or None for all.
        workers: None: the CPUs that this job may use.
        max_read_rate, max_write_rate: bytes per second; 0: no limit.
        max_create_rate: files per second; 0: no limit.
        min_free_space, min_free_memory: bytes as an int, a share of the whole as a float below 1; None: the default.
        stall_timeout: seconds.
    """

    base_dir: Path = Path()
    target_dir: Path | None = None
    train_archive: Path | None = None
    val_archive: Path | None = None
    class_index: Path | None = None
    val_labels: Path | None = None
    splits: tuple[SplitName, ...] | None = None
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
    min_free_space: float | None = None
    min_free_memory: float | None = None
    stall_timeout: float = DEFAULT_STALL_S
    uncached_writes: bool = False
    keep_mtime: bool = False
    same_archive: bool = False
    wait: bool = False
    durability: Durability = "disk"
    sync: SyncMode = "auto"
    restart: bool = False
    force: bool = False

    @property
    def target(self) -> Path:
        """The folder where the tree goes, absolute."""
        return (self.target_dir or self.base_dir / "ImageNet").absolute()


def planners(options: UnpackOptions) -> tuple[dict[SplitName, Replan], tuple[int, ...] | None]:
    """Find archives and label files; return how to plan each split, and the class indices asked for (None: all).

    Raises:
        ArchiveError: an archive that is needed is missing.
        LabelError: a label file is missing or damaged.
        UsageError: options contradict each other, or a class is unknown.
    """
    base = options.base_dir
    named: dict[SplitName, Path | None] = {"train": options.train_archive, "val": options.val_archive}
    archives: dict[SplitName, Path] = {
        "train": options.train_archive or base / ilsvrc2012.TRAIN_ARCHIVE_NAME,
        "val": options.val_archive or base / ilsvrc2012.VAL_ARCHIVE_NAME,
    }
    for split in options.splits or SPLITS:
        if (options.splits or named[split]) and not archives[split].exists():
            raise ArchiveError(f"{archives[split]}: no such file: it is needed for the {split} split")
    splits = options.splits or tuple(split for split in SPLITS if archives[split].exists())
    if not splits:
        raise ArchiveError(
            f"no ImageNet archives in {base.absolute()}: expected {ilsvrc2012.TRAIN_ARCHIVE_NAME} or "
            f"{ilsvrc2012.VAL_ARCHIVE_NAME}; give --base-dir, --train-archive or --val-archive"
        )
    if options.any_wnids:
        if splits != ("train",) or options.layout != "wnid":
            raise UsageError("--any-wnids needs --splits train --layout wnid: other classes have no labels here")
        if options.classes is not None:
            raise UsageError("--any-wnids takes every class of the archive: leave out --classes")
        return {"train": lambda _: planner.plan_train(archives["train"], None, None, options.layout)}, None
    wnids = load_class_index(_given(options.class_index, base / "ImageNet_class_index.json"))
    refs = class_refs(wnids, options.layout)
    asked = planner.parse_classes(options.classes, wnids) if options.classes is not None else None
    replans: dict[SplitName, Replan] = {}
    if "train" in splits:
        replans["train"] = lambda wanted: planner.plan_train(archives["train"], refs, wanted, options.layout)
    if "val" in splits:
        val_labels = labels.load_val_labels(_given(options.val_labels, base / "ImageNet_val_label.txt"), wnids)
        replans["val"] = lambda wanted: planner.plan_val(archives["val"], refs, wanted, options.layout, val_labels)
    return replans, asked


def _given(explicit: Path | None, default: Path) -> Path | None:
    """A file named by an option must be there; one of the usual name counts when it is."""
    return explicit or (default if default.exists() else None)


def verify(options: UnpackOptions, plan: SplitPlan) -> None:
    """Compare a plan's archive with the published digest if `verify_archives` asks for it.

    Raises:
        ArchiveError: it is another archive.
    """
    if options.verify_archives == "digest":
        planner.verify_digest(plan.archive, plan.split)


def limits(options: UnpackOptions) -> Limits:
    """Turn shares into bytes of the target's file system and of this job's memory."""

    def threshold(given: float | None, total: int) -> int:
        if given is None:
            return runner.DEFAULT
        return round(given * total) if isinstance(given, float) else given

    return Limits(
        free_space=threshold(
            options.min_free_space, resources.room(options.target, content_bytes=0, files=0).bytes_total
        ),
        free_memory=threshold(options.min_free_memory, resources.memory().total),
        read_rate=options.max_read_rate,
        write_rate=options.max_write_rate,
        create_rate=options.max_create_rate,
        stall_timeout_s=options.stall_timeout,
    )


def worker_count(workers: int | None) -> int:
    """Return how many worker processes to start: those asked for or a CPU each, as far as memory allows."""
    return resources.workers_that_fit(workers or resources.usable_cpus(os.environ), resources.memory())


def make_executor(options: UnpackOptions, reporter: Reporter) -> Executor:
    """Return what is to run the shards.

    Raises:
        UsageError: options contradict each other, or the extra [dask] is missing.
    """
    scheduler = options.dask_scheduler or options.dask_scheduler_file
    if options.executor == "dask":
        if scheduler is None:
            raise UsageError("--executor dask needs --dask-scheduler or --dask-scheduler-file")
        from imagenet_unpack.run.dask_executor import DaskExecutor  # noqa: PLC0415 - half a second, and an extra

        file = None if options.dask_scheduler_file is None else str(options.dask_scheduler_file)
        return DaskExecutor(options.dask_scheduler, file, stall_timeout_s=options.stall_timeout)
    if scheduler is not None:
        raise UsageError("--dask-scheduler and --dask-scheduler-file need --executor dask")
    if options.executor == "serial":
        return SerialExecutor()
    workers = worker_count(options.workers)
    if options.workers is not None and workers < options.workers:
        reporter.note(f"memory allows only {workers} of {options.workers} workers")
    pool.start_server(WORKER_MODULE)  # gets ready while the archives are planned
    return LocalExecutor(workers)


def run(options: UnpackOptions, executor: Executor, reporter: Reporter, cancel: Cancel) -> RunSummary:
    """Plan, extract, check and publish.

    Raises:
        UnpackError: the run could not start.
    """
    if options.restart and not options.part.whole:
        raise UsageError("--restart would discard the work of the other parts: run once with --part 0/1 --restart")
    if options.durability == "none" and not options.part.whole:
        raise UsageError("--durability none is for one run on one node: leave out --part")
    replans, asked = planners(options)
    return runner.run(
        runner.Options(
            target=options.target,
            planners=replans,
            classes=asked,
            verify=lambda plan: verify(options, plan),
            time_counts=options.verify_archives != "digest" and not options.same_archive,
            sync=options.sync,
            durable=options.durability == "disk",
            wait=options.wait,
            part=options.part,
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


def plan_splits(options: UnpackOptions) -> dict[SplitName, SplitPlan]:
    """Plan every split asked for and verify its archive.

    Raises:
        UnpackError: an archive or a label file is missing or damaged.
    """
    replans, asked = planners(options)
    plans = {split: replan(asked) for split, replan in replans.items()}
    for plan in plans.values():
        verify(options, plan)
    return plans


def class_spec(classes: str | int | Iterable[int | str]) -> str:
    """Return class indices and wnids in the form of `--classes`."""
    if isinstance(classes, (str, int)):
        return str(classes)
    return ",".join(map(str, classes))
