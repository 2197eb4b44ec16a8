"""Drives the making of images: plan, place the archives, read or copy their shards, write the tables, publish.

What an unfinished run has copied is journaled, and the same call continues it. Nothing is under the output's name, and
no byte of an archive is changed, before everything is whole and on the disk.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Literal

from imagenet_unpack.errors import (
    ArchiveError,
    CancelledError,
    ExitCode,
    StoppedError,
    TargetError,
    UnpackError,
    reason,
)
from imagenet_unpack.extract import throttle
from imagenet_unpack.extract.imaging import (
    ImageSettings,
    copy_range,
    image_shard,
    is_packed,
    packed_file,
    recover,
    shard_key,
)
from imagenet_unpack.extract.throttle import Limits
from imagenet_unpack.extract.worker import Settings
from imagenet_unpack.host import resources
from imagenet_unpack.host.status import Monitor, Progress, StatusFile
from imagenet_unpack.model import (
    Layout,
    Outcome,
    RunSummary,
    Shard,
    ShardFailed,
    SplitName,
    SplitPlan,
    SplitSummary,
)
from imagenet_unpack.reporter import LockedReporter, Reporter
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.run.executors import Executor
from imagenet_unpack.run.imageclone import Cloning, cannot_clone, first_that_cannot
from imagenet_unpack.run.imageplan import Assembler, DataArea, identity, identity_digest
from imagenet_unpack.run.runner import COMMIT_S, DEFAULT
from imagenet_unpack.run.splitrun import Replan
from imagenet_unpack.sources.imagerecord import (
    TAR_BLOCK_BYTES,
    ImageRecord,
    Method,
    Original,
    is_image,
    read_original,
    read_record,
)
from imagenet_unpack.targets import archivelock
from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.targets.imagefile import ImageState, bring_back, convert, reserve
from imagenet_unpack.targets.imagetree import Figures, ImageTree
from imagenet_unpack.targets.locks import LockFile
from imagenet_unpack.targets.runfile import RunFile

_TABLE_BYTES = 64  # of tables and manifest, an image
_TABLES_BYTES = 1 << 20
_CHUNK_BYTES = 64 << 20

ChosenMethod = Literal["auto", "reflink", "copy", "in-place"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user asked for.

    Attributes:
        output: the image; for `in-place` it is not used.
        planners: how to plan each split asked for.
        classes: the class indices asked for, or None for all.
        verify: compares a plan's archive with the published facts.
        method: how the archives get into the image; `auto`: `reflink` where it works, else `copy`.
        layouts: names of the class folders first, then those of links to them.
        restart: throw an unfinished image away first.
        limits: rates and thresholds; thresholds of -1 are the default.
        force: begin even where the room seems too small.
        disk: makes the durable writes below a folder.
    """

    output: Path
    planners: dict[SplitName, Replan]
    classes: tuple[int, ...] | None
    verify: Callable[[SplitPlan], None]
    method: ChosenMethod = "auto"
    layouts: tuple[Layout, ...] = ("index",)
    restart: bool = False
    limits: Limits = Limits(free_space=DEFAULT, free_memory=DEFAULT)
    force: bool = False
    disk: Callable[[Path], Disk] = Disk.for_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSummary:
    """What became of the images.

    Attributes:
        run: counts and exit code, as of an unpack run.
        method: how they were made; None where none was begun.
        images: the image files that are whole now.
    """

    run: RunSummary
    method: Method | None
    images: tuple[Path, ...]


def make_images(options: Options, executor: Executor, reporter: Reporter, cancel: Cancel) -> ImageSummary:
    """Make one image of all splits, or (`in-place`) one of each archive.

    Raises:
        UnpackError: it could not start.
    """
    with cancel.watched():
        return _Making(options, executor, reporter, cancel).run()


def restore(path: Path, disk: Disk) -> None:
    """Turn an image that was made in place, or what a crash left of its making, back into the archive.

    Raises:
        TargetError: it is no such image, is in use, or cannot be written.
    """
    state = ImageState(path, disk)
    with _named(path, TargetError), archivelock.exclusive(path):
        original = read_original(path)
        if is_image(path) and original is None:
            record = read_record(path)
            original = record.original if record is not None else None
            if original is None:
                raise TargetError(
                    f"{path}: was not made in place, so no archive was changed: there is nothing to restore"
                )
        if original is None and not state.exists():
            raise TargetError(f"{path}: is not an image that was made in place")
        with _claimed(state):
            if original is not None:
                bring_back(path, state, original)
            state.remove()


@dataclass(slots=True, kw_only=True)
class _Job:
    """One image on its way."""

    state: ImageState
    method: Method
    plans: tuple[SplitPlan, ...]
    data: DataArea
    done: set[str] = field(default_factory=set)
    skipped: int = 0
    uncommitted: list[str] = field(default_factory=list)


class _Making:
    def __init__(self, options: Options, executor: Executor, reporter: Reporter, cancel: Cancel) -> None:
        self._options = options
        self._executor = executor
        self._reporter = LockedReporter(reporter)
        self._cancel = cancel
        self._status = StatusFile.create()
        self._monitor = Monitor(self._status, self._advance, self._reporter.waiting)
        self._fatal: ShardFailed | None = None
        self._failures: list[ShardFailed] = []
        self._splits: dict[SplitName, SplitSummary] = {}
        self._images: list[Path] = []
        self._method: Method | None = None

    def run(self) -> ImageSummary:
        begun = False
        message = ""
        code = ExitCode.OK
        try:
            for plans in self._groups():
                with ExitStack() as stack:
                    job = self._open(plans, stack)
                    begun = True
                    if job is not None and not self._make(job, stack):
                        break
        except CancelledError:
            pass
        except (StoppedError, ArchiveError) as error:
            if not begun:
                raise
            code, message = error.exit_code, str(error)
        finally:
            self._executor.close()
            self._status.close()
        return self._summary(code, message)

    def _groups(self) -> list[tuple[SplitPlan, ...]]:
        """Plan everything; return the plans of each image to be made."""
        plans = []
        for split in self._options.planners:
            plan = self._options.planners[split](self._options.classes)
            self._options.verify(plan)
            plans.append(plan)
            for note in plan.notes:
                self._reporter.note(note)
            if self._options.method not in ("auto", "copy") and any(map(is_packed, plan.shards)):
                raise ArchiveError(
                    f"{plan.archive.path}: is no plain tar, so its images have to be copied: use --method copy"
                )
            if self._options.method == "in-place" and plan.files:
                raise ArchiveError(
                    f"{plan.archive.path}: --method in-place needs a single archive: use reflink or copy"
                )
        return [(plan,) for plan in plans] if self._options.method == "in-place" else [tuple(plans)]

    def _open(self, plans: tuple[SplitPlan, ...], stack: ExitStack) -> _Job | None:
        """Claim the state folder of an image and begin or continue; None where the image is there already."""
        options = self._options
        in_place = options.method == "in-place"
        output = Path(plans[0].archive.path) if in_place else options.output
        state = ImageState(output, options.disk(output.parent))
        if in_place:
            stack.enter_context(_exclusive(output))
            if is_image(output):
                self._reporter.note(f"{output} is an image already; `restore` brings the archive back")
                record = read_record(output)
                if record is None or plans[0].split not in record.splits:
                    raise TargetError(f"{output}: is an image of something else")
                self._published(output, record, plans, None)
                _remove_leftovers(state)
                return None
        else:
            stack.enter_context(
                archivelock.shared(file.path for plan in plans for file in plan.files or [plan.archive])
            )
        if not in_place and os.path.lexists(output) and not options.restart and self._is_made(output, plans):
            _remove_leftovers(state)
            return None
        stack.enter_context(_claimed(state))
        if in_place:
            pending = read_original(output)
            if pending is not None:  # a crash came before the superblock was written
                bring_back(output, state, pending)
                plans = tuple(options.planners[plan.split](options.classes) for plan in plans)
        if options.restart:
            state.clear_work()
        try:
            return self._begin(state, plans)
        except TargetError:
            if not state.done():  # nothing is lost that another attempt could use
                state.remove()
            raise

    def _begin(self, state: ImageState, plans: tuple[SplitPlan, ...]) -> _Job:
        """Begin an image, or continue one; its state folder is claimed."""
        options = self._options
        method = self._place_archives(state, plans)
        data = DataArea.of(plans, method)
        job = _Job(state=state, method=method, plans=plans, data=data)
        self._method = method
        with _named(state.folder, TargetError):
            if state.begin(identity(plans, method, options.layouts, data)) and method == "copy":
                job.done = state.done()
            job.skipped = len(job.done)
            self._require_room(job)
            if method != "in-place":
                self._fill(job)
        return job

    def _is_made(self, output: Path, plans: tuple[SplitPlan, ...]) -> bool:
        """Say whether `output` is the image that is asked for.

        Raises:
            TargetError: it is something else.
        """
        record = read_record(output) if output.is_file() else None
        methods: tuple[Method, ...] = ("reflink", "copy")
        asked = {
            identity_digest(identity(plans, method, self._options.layouts, DataArea.of(plans, method)))
            for method in methods
        }
        if record is None or record.identity not in asked:
            raise TargetError(f"{output} exists: choose another --output, or remove it")
        self._reporter.note(f"{output} is complete already")
        self._published(output, record, plans, None)
        return True

    def _place_archives(self, state: ImageState, plans: Sequence[SplitPlan]) -> Method:
        """Return the method: for `auto`, try whether extents can be shared."""
        wanted = self._options.method
        if wanted in ("copy", "in-place"):
            return wanted
        if any(is_packed(shard) for plan in plans for shard in plan.shards):
            return "copy"
        archives = {shard.archive.path: shard.archive for plan in plans for shard in plan.shards}
        with _named(state.folder, TargetError):
            other = first_that_cannot(archives.values(), state.folder)
        if other is None:
            return "reflink"
        if wanted == "reflink":
            raise cannot_clone(state.output, other)
        return "copy"

    def _require_room(self, job: _Job) -> None:
        copied = sum(shard.size_bytes for shard in self._todo(job)) if job.method == "copy" else 0
        copied += sum(shard.size_bytes for plan in job.plans for shard in plan.shards if is_packed(shard))
        images = sum(plan.images for plan in job.plans)
        room = resources.room(job.state.folder, content_bytes=copied + images * _TABLE_BYTES + _TABLES_BYTES, files=16)
        if room.fault is not None:
            if not self._options.force:
                raise TargetError(f"{room.fault}: free some space, or use --force to try anyway")
            self._reporter.note(f"{room.fault}: trying anyway")

    def _fill(self, job: _Job) -> None:
        """Make the image file as large as its data area."""
        fresh = not job.done
        fd = os.open(job.state.image, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if fresh:
                os.ftruncate(fd, 0)
            if fresh and job.method == "copy":
                reserve(fd, job.data.end)
            os.ftruncate(fd, job.data.end)
        finally:
            os.close(fd)

    def _make(self, job: _Job, stack: ExitStack) -> bool:
        """Read or copy the shards, write the tables and publish; return whether the image is whole."""
        state = job.state
        in_place = job.method == "in-place"
        with _named(state.folder, StoppedError):
            file = stack.enter_context(state.image.open("w+b" if in_place else "r+b"))
            packed = [shard for plan in job.plans for shard in plan.shards if is_packed(shard)]
            if packed:
                self._read(job, None, stack)
                if self._todo(job) or self._ending or self._failures:
                    return False
                self._append_packed(job, file, packed)
            file.seek(0 if in_place else job.data.end)
            file.truncate()
            tree = stack.enter_context(ImageTree(file, job.data.end, state.folder, bare=in_place))
            assembler = Assembler(tree, job.plans, state.folder, job.data.shifts)
            cloning = Cloning(job.data, file.fileno(), state.output, self._cancel)
            stack.callback(cloning.join)
            if job.method == "reflink":
                cloning.start()
            if packed:
                self._describe(job, assembler)
            else:
                self._read(job, assembler, stack)
            cloning.result()
            if not assembler.finished or self._ending or self._failures:
                return False
            if job.method == "copy":
                for piece in job.data.gaps(job.plans):
                    self._cancel.check()
                    copy_range(piece.archive, file.fileno(), piece.offset, piece.end, piece.shift)
            for layout in dict.fromkeys(self._options.layouts[1:]):
                tree.add_links(layout)
            superblock, end, digest = tree.finish()
            self._cancel.check()
            record = self._record(job, tree.figures, superblock, end, digest)
            file.write(record.to_block())
            file.truncate()  # gives back what XFS has reserved behind the end
            if record.original is not None:
                state.keep_original(record.original)
                convert(Path(job.plans[0].archive.path), state, record.original, job.data.end, superblock)
            else:
                os.pwrite(file.fileno(), superblock, 0)
                state.publish()
        self._published(state.output, record, job.plans, job.skipped)
        return True

    def _record(
        self, job: _Job, figures_of: dict[SplitName, Figures], superblock: bytes, end: int, digest: str
    ) -> ImageRecord:
        original = None
        if job.method == "in-place":
            archive = job.plans[0].archive
            with open(archive.path, "rb") as file:
                first_block = file.read(TAR_BLOCK_BYTES)
                status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != (archive.size_bytes, archive.mtime_ns):
                raise ArchiveError(f"{archive.path}: it changed during the run: run the same command again")
            original = Original(size_bytes=archive.size_bytes, mtime_ns=archive.mtime_ns, first_block=first_block)
        return ImageRecord(
            method=job.method,
            identity=identity_digest(identity(job.plans, job.method, self._options.layouts, job.data)),
            layouts=self._options.layouts,
            splits={
                split: (figures.classes, figures.images, figures.size_bytes) for split, figures in figures_of.items()
            },
            official=tuple(plan.split for plan in job.plans if plan.archive.official),
            superblock=superblock,
            start=job.data.end,
            end=end,
            digest=digest,
            archives=job.data.held(job.plans),
            original=original,
        )

    def _append_packed(self, job: _Job, file: BinaryIO, shards: Sequence[Shard]) -> None:
        """Put the bytes that were packed into the image; where extents can be shared, no byte is copied."""
        paths = [packed_file(job.state.folder, shard) for shard in shards]
        at = job.data.end
        job.data = job.data.with_packed((shard, path.stat().st_size) for shard, path in zip(shards, paths, strict=True))
        for path in paths:
            with open(path, "rb", buffering=0) as source:
                while True:
                    self._cancel.check()
                    copied = os.copy_file_range(source.fileno(), file.fileno(), _CHUNK_BYTES, offset_dst=at)
                    if not copied:
                        break
                    at += copied

    def _read(self, job: _Job, assembler: Assembler | None, stack: ExitStack) -> None:
        """Run the shards that are not done, and describe the classes (if that is possible) as they become known."""
        shards_in_order = self._todo(job) if assembler is None else assembler.order
        order = [shard for shard in shards_in_order if shard_key(shard) not in job.done]
        todo = {shard_key(shard): replace(shard, slot=slot) for slot, shard in enumerate(order)}
        run_file = RunFile.create_in(job.state.folder)
        stack.callback(run_file.remove)
        stack.enter_context(self._cancel.workers(stop=run_file.stop, kill=self._executor.kill))
        stack.enter_context(self._monitor.running())
        copying = job.method == "copy"
        settings = ImageSettings(
            run=Settings(
                target=str(job.state.folder),
                part="0-of-1",
                run_file=str(run_file.path),
                status=self._status.path,
                limits=self._limits(job),
            ),
            folder=str(job.state.folder),
            copy_to=str(job.state.image) if copying else "",
            shifts=job.data.shifts if copying else {},
        )
        task = functools.partial(image_shard, settings=settings)
        what = "copying" if copying else "reading headers"
        self._reporter.phase(what, sum(shard.size_bytes for shard in order), None)

        def shards() -> Iterator[Shard]:
            for shard in todo.values():
                if self._ending:
                    return
                self._monitor.begin(shard.slot)
                yield shard

        committed = time.monotonic()
        self._describe(job, assembler)
        for outcome in self._executor.run(shards(), task, functools.partial(recover, folder=job.state.folder)):
            self._collect(job, outcome, todo)
            self._describe(job, assembler)
            if copying and job.uncommitted and time.monotonic() - committed > COMMIT_S:
                self._commit(job)
                committed = time.monotonic()
        if copying and job.uncommitted:
            self._commit(job)

    def _describe(self, job: _Job, assembler: Assembler | None) -> None:
        if assembler is None or self._failures or self._ending:
            return
        try:
            assembler.advance(job.done)
        except ArchiveError as error:
            split = job.plans[0].split
            self._failures.append(ShardFailed(shard="", split=split, kind="archive", message=str(error)))
            self._reporter.note(str(error))

    def _collect(self, job: _Job, outcome: Outcome, shards: dict[str, Shard]) -> None:
        key = f"{outcome.split}.{outcome.shard}"
        shard = shards[key]
        shown = self._monitor.end(shard.slot)
        if isinstance(outcome, ShardFailed):
            if shown != Progress():
                self._advance(-shown.size_bytes, -shown.images)
            if outcome.fatal:
                if self._fatal is None:
                    self._fatal = outcome
                    self._cancel.request()
            elif outcome.kind != "stopped":
                self._failures.append(outcome)
                self._reporter.note(f"{outcome.split} shard {outcome.shard} failed: {outcome.message}")
            return
        nbytes, images = shard.size_bytes - shown.size_bytes, outcome.images - shown.images
        self._reporter.advance(nbytes=nbytes, images=images, shards=1)
        for note in outcome.notes:
            self._reporter.note(note)
        job.done.add(key)
        job.uncommitted.append(key)

    def _advance(self, nbytes: int, images: int) -> None:
        self._reporter.advance(nbytes=nbytes, images=images, shards=0)

    def _commit(self, job: _Job) -> None:
        job.state.commit(job.uncommitted)
        job.uncommitted = []

    def _todo(self, job: _Job) -> list[Shard]:
        return [shard for plan in job.plans for shard in plan.shards if shard_key(shard) not in job.done]

    def _limits(self, job: _Job) -> Limits:
        limits = self._options.limits
        if limits.free_space == DEFAULT:
            room = resources.room(job.state.folder, content_bytes=0, files=0)
            needed = 0 if job.method == "copy" else _TABLES_BYTES  # copied to is room that is reserved already
            limits = replace(limits, free_space=throttle.default_free_space(room.bytes_total, room.bytes_free, needed))
        if limits.free_memory == DEFAULT:
            limits = replace(limits, free_memory=throttle.default_free_memory(resources.memory().total))
        return limits

    @property
    def _ending(self) -> bool:
        return self._cancel.requested

    def _published(self, output: Path, record: ImageRecord, plans: Sequence[SplitPlan], skipped: int | None) -> None:
        """Count what an image holds; `skipped` shards were done by earlier runs, None: all of them."""
        self._method = record.method
        self._images.append(output)
        for plan in plans:
            classes, images, size_bytes = record.splits[plan.split]
            shards = len(plan.shards)
            self._splits[plan.split] = SplitSummary(
                status="published",
                classes=classes,
                images=images,
                size_bytes=size_bytes,
                shards=shards,
                shards_skipped=shards if skipped is None else min(skipped, shards),
                shards_failed=0,
            )

    def _summary(self, code: ExitCode, message: str) -> ImageSummary:
        if self._fatal is not None:
            code = ExitCode.STOPPED
            message = f"{self._fatal.message}: fix this, then run the same command again to continue"
        elif any(failure.kind == "defect" for failure in self._failures):
            code, message = ExitCode.DEFECT, "this is a defect of the program: please report it with the lines above"
        elif self._failures:
            code = ExitCode.SHARDS_FAILED
            message = (
                f"{len(self._failures)} classes could not be read (see above): replace the archive, then try again"
            )
        number: int = code
        if self._cancel.signal is not None and code == ExitCode.OK and len(self._splits) < len(self._options.planners):
            number, message = self._cancel.exit_code, "stopped by a signal: run the same command again to continue"
        run = RunSummary(
            exit_code=number,
            splits=self._splits,
            failures=(*self._failures, *((self._fatal,) if self._fatal is not None else ())),
            message=message,
        )
        return ImageSummary(run=run, method=self._method, images=tuple(self._images))


class _named:  # noqa: N801 - used like a function
    """Turn errors of files that this module itself meets into known ones that name the file."""

    def __init__(self, path: Path, kind: type[UnpackError]) -> None:
        self._path = path
        self._kind = kind

    def __enter__(self) -> None:
        """Nothing to begin."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, OSError):
            where = error.filename or self._path
            raise self._kind(f"{where}: {reason(error)}: fix this, then run the same command again") from error


def _remove_leftovers(state: ImageState) -> None:
    """Remove what a crash left of the state of an image that is whole."""
    if state.exists():
        with _claimed(state):
            state.remove()


def _claimed(state: ImageState) -> ExitStack:
    """Claim a state folder and hold its lock until the end of the block."""
    stack = ExitStack()
    state.claim()
    lock = stack.enter_context(LockFile(state.lock, str(state.output)))
    lock.take()
    lock.sign()
    return stack


def _exclusive(path: Path) -> ExitStack:
    """Hold the only lock on an archive that is to be changed, having looked whether that may be done.

    Raises:
        TargetError: it may not.
    """
    stack = ExitStack()
    status = path.lstat()
    if path.is_symlink():
        raise TargetError(f"{path}: is a symbolic link: give the archive itself")
    if status.st_nlink > 1:
        raise TargetError(
            f"{path}: has {status.st_nlink} hard links, and all of them would change: use reflink or copy"
        )
    if not os.access(path, os.W_OK) or not status.st_mode & 0o222:
        raise TargetError(f"{path}: is read-only: make it writable, or use --method reflink or copy")
    with _named(path, TargetError):
        stack.enter_context(archivelock.exclusive(path))
    return stack
