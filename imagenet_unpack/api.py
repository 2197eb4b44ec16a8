"""The Python interface: `unpack`, `plan` and `check` as functions. See docs/python.md."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from imagenet_unpack import options as option_values
from imagenet_unpack.checking.entry import check_path
from imagenet_unpack.errors import (
    CheckError,
    ExitCode,
    ShardsFailedError,
    StoppedError,
    UnpackError,
    UsageError,
    named_os_errors,
)
from imagenet_unpack.extract.throttle import DEFAULT_STALL_S
from imagenet_unpack.host import resources
from imagenet_unpack.model import (
    LAYOUTS,
    SPLITS,
    Layout,
    Part,
    RunSummary,
    SplitCheck,
    SplitName,
    SplitPlan,
    VerifyLevel,
)
from imagenet_unpack.options import ExecutorName, UnpackOptions
from imagenet_unpack.planning import planner
from imagenet_unpack.reporter import NullReporter, Reporter
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.targets import consume as consume_archive
from imagenet_unpack.targets.durable import SYNC_MODES, SyncMode
from imagenet_unpack.targets.records import Durability

StrPath = str | os.PathLike[str]

_ERRORS: dict[int, type[UnpackError]] = {
    ExitCode.SHARDS_FAILED: ShardsFailedError,
    ExitCode.CHECK_DIFFERS: CheckError,
    ExitCode.STOPPED: StoppedError,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResult:
    """What `plan` found.

    Attributes:
        splits: the plan of each split asked for.
        left: what of it is neither published nor finished in an unfinished run.
        target: where the tree would go, absolute.
        room: what is left needs of the target's file system, and what that has free.
    """

    splits: dict[SplitName, SplitPlan]
    left: dict[SplitName, SplitPlan]
    target: Path
    room: resources.Room

    @property
    def fits(self) -> bool:
        """Whether the target has room for all of it."""
        return self.room.fault is None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """What `check` found: a result for each split that is there."""

    splits: dict[SplitName, SplitCheck]

    @property
    def ok(self) -> bool:
        """Whether every split is whole."""
        return not any(split.problems for split in self.splits.values())


def unpack(
    *,
    base_dir: StrPath = ".",
    target_dir: StrPath | None = None,
    train_archive: StrPath | None = None,
    val_archive: StrPath | None = None,
    test_archive: StrPath | None = None,
    source: StrPath | Iterable[StrPath] = (),
    class_index: StrPath | None = None,
    val_labels: StrPath | None = None,
    splits: Iterable[SplitName] | None = None,
    classes: str | int | Iterable[int | str] | None = None,
    any_wnids: bool = False,
    layout: Layout = "index",
    workers: int | None = None,
    executor: ExecutorName = "local",
    dask_scheduler: str | None = None,
    dask_scheduler_file: StrPath | None = None,
    part: tuple[int, int] = (0, 1),
    verify_archives: VerifyLevel = "size",
    max_read_rate: float = 0.0,
    max_write_rate: float = 0.0,
    max_create_rate: float = 0.0,
    rate_dir: StrPath | None = None,
    min_free_space: float | None = None,
    min_free_memory: float | None = None,
    stall_timeout: float = DEFAULT_STALL_S,
    uncached_writes: bool = False,
    keep_mtime: bool = False,
    same_archive: bool = False,
    repair: bool = False,
    consume: bool = False,
    yes: bool = False,
    wait: bool = False,
    durability: Durability = "disk",
    first: SplitName | None = None,
    sync: SyncMode = "auto",
    restart: bool = False,
    force: bool = False,
    progress: Reporter | None = None,
) -> RunSummary:
    """Unpack the archives, check the result and publish it; the same call again continues an unfinished run.

    Ctrl-C (the stop button of a notebook) ends the run in good order: what is done is kept, and `KeyboardInterrupt` is
    raised. A second Ctrl-C does not wait for the workers.

    Args:
        base_dir: the folder that holds the archives and, if wanted, label files.
        target_dir: where the tree goes; None: `ImageNet` in `base_dir`.
        train_archive: None: `ILSVRC2012_img_train.tar` in `base_dir`.
        val_archive: None: `ILSVRC2012_img_val.tar` in `base_dir`.
        test_archive: None: `ILSVRC2012_img_test_v10102019.tar` in `base_dir`.
        source: archives or folders of any kind, recognised by their content; instead of what `base_dir` holds.
        class_index: None: `ImageNet_class_index.json` in `base_dir` if it is there, else the built-in classes.
        val_labels: None: `ImageNet_val_label.txt` in `base_dir` if it is there, else the built-in labels.
        splits: such as `("train", "val", "test")`; None: train and val, as far as their archives are there.
        classes: indices and wnids, such as `range(100)` or `"0-99,n01440764"`; None: all.
        any_wnids: take inner tars of any wnids, as in ImageNet-21K.
        layout: names of the class folders: `index` (`0`), `padded` (`0000`) or `wnid` (`n01440764`). Most training
            libraries number classes by the sorted folder names, which gives the published indices for `padded` and
            `wnid` only.
        workers: number of worker processes; None: the CPUs that this job may use.
        executor: what extracts: `local` processes, this process (`serial`), or a `dask` cluster.
        dask_scheduler: address of the scheduler, for `executor="dask"`.
        dask_scheduler_file: or the file that holds it.
        part: `(i, n)`: do part i (from 0) of n; `(0, 1)` does everything, checks and publishes.
        verify_archives: compare the archives with the published facts first: not at all, their sizes, or their digests.
        max_read_rate: bytes per second, shared by all runs of this user on a host; 0: no limit.
        max_write_rate: bytes per second, likewise.
        max_create_rate: files per second, likewise.
        rate_dir: share the rates with the runs on this host that name the same local folder; None: with all runs of
            this user on this host.
        min_free_space: pause while less is free on the target: bytes, or a share as a float below 1; None: 1 GiB, less
            on small file systems; 0: off.
        min_free_memory: pause while this job has less memory left: likewise; None: 512 MiB, less in small jobs.
        stall_timeout: seconds to wait for space, memory or workers before the run gives up.
        uncached_writes: keep written files out of the page cache (Linux 6.14 and later).
        keep_mtime: give the files the modification times in the archive.
        same_archive: continue although the modification time of the archive differs.
        repair: extract again the images of published splits that are missing or differ from their manifest.
        consume: free each class in the archives as soon as its images are on the disk; destroys the archives.
        yes: confirm `consume`.
        wait: wait while another run works on the same target, then go on.
        durability: `none`: publish without waiting for the disk, for node-local scratch.
        first: extract this split before the others and publish it while they go on; None: val with `durability="none"`,
            else all splits are published at the end.
        sync: bring files to the disk one by one (`files`) or the file system as a whole (`fs`); `auto`: by its type.
        restart: discard the unfinished run and begin again.
        force: start even if the free space on the target seems too small.
        progress: shows the progress, for example `ProgressBar()`; None: silent.

    Returns:
        What was published, by split; its `exit_code` is 0.

    Raises:
        ShardsFailedError: some classes could not be extracted; nothing of their split was published.
        CheckError: a published split differs from its manifest.
        StoppedError: the run had to stop part way: disk full, quota, I/O error, or nothing to go on with.
        ArchiveError: an archive is missing, damaged or not what was asked for.
        LabelError: a label file is missing, damaged or does not fit the archive.
        TargetError: the target cannot be used.
        UsageError: an argument is invalid, or arguments contradict each other.
        KeyboardInterrupt: the run was interrupted; the same call continues.
    """
    values = UnpackOptions(
        base_dir=_path(base_dir),
        target_dir=_optional_path(target_dir),
        train_archive=_optional_path(train_archive),
        val_archive=_optional_path(val_archive),
        test_archive=_optional_path(test_archive),
        source=_sources(source),
        class_index=_optional_path(class_index),
        val_labels=_optional_path(val_labels),
        splits=_splits(splits),
        classes=None if classes is None else option_values.class_spec(classes),
        any_wnids=any_wnids,
        layout=layout,
        workers=workers,
        executor=executor,
        dask_scheduler=dask_scheduler,
        dask_scheduler_file=_optional_path(dask_scheduler_file),
        part=Part(index=part[0], count=part[1]),
        verify_archives=verify_archives,
        max_read_rate=max_read_rate,
        max_write_rate=max_write_rate,
        max_create_rate=max_create_rate,
        rate_dir=_optional_path(rate_dir),
        min_free_space=min_free_space,
        min_free_memory=min_free_memory,
        stall_timeout=stall_timeout,
        uncached_writes=uncached_writes,
        keep_mtime=keep_mtime,
        same_archive=same_archive,
        repair=repair,
        consume=consume,
        yes=yes,
        wait=wait,
        durability=durability,
        first=first,
        sync=sync,
        restart=restart,
        force=force,
    )
    _require_valid(values)
    reporter = progress or NullReporter()
    cancel = Cancel()
    try:
        with _ctrl_c_stops(cancel), named_os_errors():
            executor_ = option_values.make_executor(values, reporter)
            summary = option_values.run(values, executor_, reporter, cancel)
    finally:
        reporter.close()
    if cancel.signal is not None and summary.exit_code != ExitCode.OK:
        raise KeyboardInterrupt(summary.message)
    if summary.exit_code == ExitCode.OK:
        return summary
    error = _ERRORS.get(summary.exit_code, UnpackError)(summary.message)
    error.exit_code = ExitCode(summary.exit_code)
    error.summary = summary
    raise error


def plan(
    *,
    base_dir: StrPath = ".",
    target_dir: StrPath | None = None,
    train_archive: StrPath | None = None,
    val_archive: StrPath | None = None,
    test_archive: StrPath | None = None,
    source: StrPath | Iterable[StrPath] = (),
    class_index: StrPath | None = None,
    val_labels: StrPath | None = None,
    splits: Iterable[SplitName] | None = None,
    classes: str | int | Iterable[int | str] | None = None,
    any_wnids: bool = False,
    layout: Layout = "index",
    verify_archives: VerifyLevel = "size",
    progress: Reporter | None = None,
) -> PlanResult:
    """Read the archives' headers and return what `unpack` with these arguments would do; writes nothing.

    The arguments are those of `unpack`; the ones that do not change the plan are left out.

    Raises:
        ArchiveError: an archive is missing, damaged or not what was asked for.
        LabelError: a label file is missing, damaged or does not fit the archive.
        TargetError: a record in the target is damaged.
        UsageError: an argument is invalid, or arguments contradict each other.
    """
    values = UnpackOptions(
        base_dir=_path(base_dir),
        target_dir=_optional_path(target_dir),
        train_archive=_optional_path(train_archive),
        val_archive=_optional_path(val_archive),
        test_archive=_optional_path(test_archive),
        source=_sources(source),
        class_index=_optional_path(class_index),
        val_labels=_optional_path(val_labels),
        splits=_splits(splits),
        classes=None if classes is None else option_values.class_spec(classes),
        any_wnids=any_wnids,
        layout=layout,
        verify_archives=verify_archives,
    )
    _require_valid(values)
    return plan_options(values, progress or NullReporter())


def plan_options(options: UnpackOptions, reporter: Reporter) -> PlanResult:
    """Plan what `options` ask for.

    Raises:
        UnpackError: as `plan`.
    """
    try:
        with named_os_errors():
            plans = option_values.plan_splits(options, reporter)
            left = {name: rest for name, (_, rest) in plans.items()}
            plans_left = [plan for plan in left.values() if plan.shards or plan.stream]
            in_flight = None
            if options.consume and consume_archive.on_same_file_system(plans_left, options.target):
                in_flight = 2 * resources.worker_count(options.workers)
            room = resources.room(options.target, **planner.needs(plans_left, in_flight=in_flight))
    finally:
        reporter.close()
    splits = {name: whole for name, (whole, _) in plans.items()}
    return PlanResult(splits=splits, left=left, target=options.target, room=room)


def check(
    target: StrPath,
    *,
    deep: bool = False,
    contents: bool = False,
    workers: int | None = None,
    progress: Reporter | None = None,
) -> CheckResult:
    """Compare a tree with its manifests and the published facts; a tree without manifests with the facts alone.

    Args:
        target: the folder that holds `train/` and `val/`, or an image.
        deep: read every byte and compare the digests; else names and counts only.
        contents: see whether every image begins and ends as an image does; of a tree or a mounted image only.
        workers: number of worker processes; None: the CPUs that this job may use.
        progress: shows the progress; None: silent.

    Returns:
        What was found, by split; `ok` where nothing differs. Differences are a result here, not an error.

    Raises:
        TargetError: there is nothing to check, or it cannot be read.
        UsageError: the path is empty, or `contents` was asked of an image.
    """
    reporter = progress or NullReporter()
    try:
        with named_os_errors():
            found = check_path(_path(target), deep=deep, contents=contents, workers=workers, reporter=reporter)
    finally:
        reporter.close()
    return CheckResult(splits={each.split: each for each in found})


@contextmanager
def _ctrl_c_stops(cancel: Cancel) -> Iterator[None]:
    """Turn the first Ctrl-C into a request to stop in good order; the second one is raised at once.

    Python handles signals in the main thread only: in another thread the caller's handling stays as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: object) -> None:
        if cancel.signal is not None:
            raise KeyboardInterrupt
        cancel.request(number)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _path(value: StrPath) -> Path:
    text = os.fspath(value)
    if not text:
        raise UsageError("an empty path was given")
    return Path(text)


def _optional_path(value: StrPath | None) -> Path | None:
    return None if value is None else _path(value)


def _sources(paths: StrPath | Iterable[StrPath]) -> tuple[Path, ...]:
    return (_path(paths),) if isinstance(paths, (str, os.PathLike)) else tuple(map(_path, paths))


_AMOUNTS = ("max_read_rate", "max_write_rate", "max_create_rate", "stall_timeout")


def _require_valid(values: UnpackOptions) -> None:
    """Refuse what the command line would refuse; types are left to type checkers.

    Raises:
        UsageError: a value is not one of those that its option takes.
    """
    choices: dict[str, tuple[str, ...]] = {
        "layout": LAYOUTS,
        "executor": get_args(ExecutorName),
        "verify_archives": get_args(VerifyLevel),
        "durability": get_args(Durability),
        "sync": SYNC_MODES,
    }
    if values.first is not None:
        choices["first"] = SPLITS
    for name, known in choices.items():
        if getattr(values, name) not in known:
            raise UsageError(f"invalid {name} {getattr(values, name)!r}: use {', '.join(known)}")
    for name in (*_AMOUNTS, "min_free_space", "min_free_memory"):
        amount = getattr(values, name)
        if amount is not None and not amount >= 0:
            raise UsageError(f"invalid {name} {amount!r}: use 0 or more")
    if values.workers is not None and values.workers < 1:
        raise UsageError(f"workers is {values.workers}: it must be at least 1")
    if not 0 <= values.part.index < values.part.count:
        raise UsageError(f"invalid part ({values.part.index}, {values.part.count}): use (i, n) with i from 0 to n-1")


def _splits(names: Iterable[SplitName] | None) -> tuple[SplitName, ...] | None:
    if names is None:
        return None
    asked = names.split(",") if isinstance(names, str) else list(names)
    if not asked or not set(asked) <= set(SPLITS):
        raise UsageError(f"invalid splits {asked}: use {', '.join(SPLITS)} or several of them")
    return tuple(split for split in SPLITS if split in asked)
