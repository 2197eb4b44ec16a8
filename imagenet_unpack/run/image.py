"""Drives the making of images: plan, place the archives, read or copy their shards, write the tables, publish.

What an unfinished run has copied is journaled, and the same call continues it. Nothing is under the output's name, and
no byte of an archive is changed, before everything is whole and on the disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imagenet_unpack.errors import ArchiveError, CancelledError, ExitCode, StoppedError, TargetError
from imagenet_unpack.extract.imaging import is_packed, shard_key
from imagenet_unpack.extract.throttle import DEFAULT, Limits
from imagenet_unpack.extract.worker import Settings
from imagenet_unpack.host import resources
from imagenet_unpack.host.signals import stopped_by
from imagenet_unpack.model import Layout, RunSummary, SplitName, SplitPlan, SplitSummary
from imagenet_unpack.reporter import LockedReporter, Reporter
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.run.executors import Executor
from imagenet_unpack.run.imageclaim import claimed, exclusive, named_errors, remove_leftovers
from imagenet_unpack.run.imageclone import Cloning, cannot_clone, first_that_cannot
from imagenet_unpack.run.imagejob import Job
from imagenet_unpack.run.imageplan import Assembler, DataArea, identity, identity_digest
from imagenet_unpack.run.imageread import TABLES_BYTES, Reading
from imagenet_unpack.run.runoptions import Replan
from imagenet_unpack.sources import consumed
from imagenet_unpack.sources.imagerecord import ImageRecord, Method, is_image, read_original, read_record
from imagenet_unpack.targets import archivelock
from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.targets.imagefile import ImageState, bring_back, convert
from imagenet_unpack.targets.imagetree import ImageTree

_TABLE_BYTES = 120  # of tables and manifest, an image

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


class _Making:
    def __init__(self, options: Options, executor: Executor, reporter: Reporter, cancel: Cancel) -> None:
        self._options = options
        self._reporter = LockedReporter(reporter)
        self._cancel = cancel
        self._reading = Reading(executor, self._reporter, cancel, options.limits)
        self._plans: dict[SplitName, SplitPlan] = {}
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
            self._reading.close()
        return self._summary(code, message)

    def _groups(self) -> list[tuple[SplitPlan, ...]]:
        """Plan everything; return the plans of each image to be made."""
        method = self._options.method
        for split, plan_split in self._options.planners.items():
            self._cancel.check()
            plan = self._plans[split] = plan_split(self._options.classes)
            consumed.require_whole(plan)
            self._options.verify(plan)
            for note in plan.notes:
                self._reporter.note(note)
            if method not in ("auto", "copy") and (plan.stream is not None or any(map(is_packed, plan.shards))):
                raise ArchiveError(
                    f"{plan.archive.path}: is not an uncompressed tar, so its images must be copied: use --method copy"
                )
            if method == "in-place" and plan.files:
                raise ArchiveError(
                    f"{plan.archive.path}: --method in-place needs a single archive: use reflink or copy"
                )
        self._cancel.check()
        plans = tuple(self._plans.values())
        return [(plan,) for plan in plans] if method == "in-place" else [plans]

    def _open(self, plans: tuple[SplitPlan, ...], stack: ExitStack) -> Job | None:
        """Claim the state folder of an image and begin or continue; None where the image is there already."""
        options = self._options
        in_place = options.method == "in-place"
        output = Path(plans[0].archive.path) if in_place else options.output
        state = ImageState(output, options.disk(output.parent))
        if in_place:
            stack.enter_context(exclusive(output))
        else:
            archives = (file.path for plan in plans for file in plan.files or [plan.archive])  # a pipe is not found
            stack.enter_context(archivelock.shared(archives))
        if self._is_converted(output, plans) if in_place else self._is_made(output, plans):
            remove_leftovers(state)
            return None
        stack.enter_context(claimed(state))
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

    def _is_converted(self, archive: Path, plans: Sequence[SplitPlan]) -> bool:
        """Say whether an archive is an image already, whatever its layouts.

        Raises:
            TargetError: it is an image of another split.
        """
        if not is_image(archive):
            return False
        record = read_record(archive)
        if record is None or plans[0].split not in record.splits:
            raise TargetError(f"{archive}: is an image of something else")
        self._reporter.note(f"{archive} is an image already; `restore` brings the archive back")
        self._published(archive, record, plans, None)
        return True

    def _is_made(self, output: Path, plans: Sequence[SplitPlan]) -> bool:
        """Say whether `output` is the image that is asked for.

        Raises:
            TargetError: it is something else.
        """
        if not os.path.lexists(output):
            return False
        if self._options.restart:
            self._require_replaceable(output, plans)
            return False
        record = read_record(output) if output.is_file() else None
        methods: tuple[Method, ...] = ("reflink", "copy")
        asked = {
            identity_digest(identity(plans, method, self._options.layouts, self._data(plans, method)))
            for method in methods
        }
        if record is None or record.identity not in asked:
            raise TargetError(f"{output} exists: choose another --output, or remove it")
        self._reporter.note(f"{output} is complete already")
        self._published(output, record, plans, None)
        return True

    def _require_replaceable(self, output: Path, plans: Sequence[SplitPlan]) -> None:
        """Make sure that nothing is lost if a file of the output's name is replaced.

        Raises:
            TargetError: it is not an image that `reflink` or `copy` made, or it is what this one is made of.
        """
        record = read_record(output) if output.is_file() and not output.is_symlink() else None
        if record is None or record.original is not None:
            raise TargetError(
                f"{output} exists and is not an image that may be replaced: choose another --output, or remove it"
            )
        sources = {shard.archive.path for plan in plans for shard in plan.shards}
        if any(os.path.exists(source) and os.path.samefile(source, output) for source in sources):
            raise TargetError(f"{output} is a source of this image: choose another --output")

    def _begin(self, state: ImageState, plans: tuple[SplitPlan, ...]) -> Job:
        """Begin an image, or continue one; its state folder is claimed."""
        method = self._method = self._method_of(state, plans)
        data = self._data(plans, method)
        asked = identity(plans, method, self._options.layouts, data)
        job = Job(state=state, method=method, plans=plans, data=data, identity=asked)
        with named_errors(state.folder, TargetError):
            if method != "copy":  # all is read again, sooner than it could be looked whether that must be
                state.clear_work()
            if state.begin(asked):
                job.done = state.done()
            job.continue_packed()
            job.skipped = frozenset(job.done)
            self._require_room(job)
            if not job.in_place:
                job.fill()
        return job

    def _data(self, plans: Sequence[SplitPlan], method: Method) -> DataArea:
        return DataArea.of(plans, method, everything=self._options.classes is None)

    def _method_of(self, state: ImageState, plans: Sequence[SplitPlan]) -> Method:
        """Return the method: for `auto`, try whether extents can be shared."""
        wanted = self._options.method
        if wanted in ("copy", "in-place"):
            return wanted
        if any(plan.stream is not None or any(map(is_packed, plan.shards)) for plan in plans):
            return "copy"
        archives = {shard.archive.path: shard.archive for plan in plans for shard in plan.shards}
        with named_errors(state.folder, TargetError):
            other = first_that_cannot(archives.values(), state.folder)
        if other is None:
            return "reflink"
        if wanted == "reflink":
            raise cannot_clone(state.output, other)
        return "copy"

    def _require_room(self, job: Job) -> None:
        copied = sum(shard.size_bytes for shard in job.todo if not is_packed(shard)) if job.method == "copy" else 0
        copied += job.unreserved_bytes(self._reading.workers)
        # Tables are spooled before they are written, and those of an archive in place come from a file of their own.
        tables = sum(plan.images for plan in job.plans) * _TABLE_BYTES * (3 if job.in_place else 2) + TABLES_BYTES
        room = resources.room(job.state.folder, content_bytes=copied + tables, files=16)
        if room.fault is not None:
            if not self._options.force:
                raise TargetError(f"{room.fault}: free some space, or use --force to try anyway")
            self._reporter.note(f"{room.fault}: trying anyway")

    def _make(self, job: Job, stack: ExitStack) -> bool:
        """Read or copy the shards, write the tables and publish; return whether the image is whole."""
        state, reading = job.state, self._reading
        with named_errors(state.folder, StoppedError):
            file = stack.enter_context(state.image.open("w+b" if job.in_place else "r+b"))
            settings = reading.prepare(job, stack)
            apart = bool(job.packed or job.streams)  # how long the data area is, is known when all has been read
            if apart:
                reading.run(job, settings, None, file.fileno())
                if job.todo or not reading.sound:
                    return False
                if job.streams and not self._read_streams(job, settings, file.fileno()):
                    return False
                job.close_data()
            file.seek(0 if job.in_place else job.data.end)
            file.truncate()
            tree = stack.enter_context(ImageTree(file, job.data.end, state.folder, bare=job.in_place))
            assembler = Assembler(tree, job.plans, state.folder, job.data.shifts)
            cloning = Cloning(job.data, file.fileno(), state.output, self._cancel)
            stack.callback(cloning.join)
            if job.method == "reflink":
                cloning.start()
            if apart:
                reading.describe(job, assembler)
            else:
                reading.run(job, settings, assembler, file.fileno())
            cloning.result()
            if not (assembler.finished and reading.sound):
                return False
            if job.method == "copy":
                job.copy_gaps(file, self._cancel)
            for layout in dict.fromkeys(self._options.layouts[1:]):
                tree.add_links(layout)
            superblock, end, digest = tree.finish()
            self._cancel.check()
            record = job.record(self._options.layouts, tree.figures, superblock, end, digest)
            file.write(record.to_block())
            file.truncate()  # gives back what XFS has reserved behind the end
            if record.original is not None:
                state.keep_original(record.original)
                convert(state.output, state, record.original, job.data.end, superblock)
            else:
                os.pwrite(file.fileno(), superblock, 0)
                if os.path.lexists(state.output):
                    if not self._options.restart:
                        raise TargetError(f"{state.output} has appeared during the run: move it away, then run again")
                    self._require_replaceable(state.output, job.plans)
                state.publish()
        self._published(state.output, record, job.plans, job.skipped)
        return True

    def _read_streams(self, job: Job, settings: Settings, image_fd: int) -> bool:
        """Copy what is read from streams; return whether all is well."""
        self._reading.read_streams(job, settings, image_fd, classes_named=self._options.classes is not None)
        job.done |= {shard_key(shard) for plan in job.plans if plan.stream is not None for shard in plan.shards}
        self._plans = {plan.split: plan for plan in job.plans}
        return self._reading.sound

    def _published(
        self, output: Path, record: ImageRecord, plans: Sequence[SplitPlan], skipped: frozenset[str] | None
    ) -> None:
        """Count what an image holds; the shards with the keys `skipped` were done by earlier runs, None: all were."""
        self._method = record.method
        self._images.append(output)
        for plan in plans:
            if plan.split not in record.splits:  # its stream holds none of it
                del self._plans[plan.split]
                continue
            classes, images, size_bytes = record.splits[plan.split]
            self._splits[plan.split] = SplitSummary(
                status="published",
                classes=classes,
                images=images,
                size_bytes=size_bytes,
                shards=len(plan.shards),
                shards_skipped=sum(skipped is None or shard_key(shard) in skipped for shard in plan.shards),
                shards_failed=0,
            )

    def _summary(self, code: ExitCode, message: str) -> ImageSummary:
        fatal, failures = self._reading.fatal, self._reading.failures
        number: int = code
        if self._cancel.signal is not None and code == ExitCode.OK and len(self._splits) < len(self._options.planners):
            number = self._cancel.exit_code
            message = f"{stopped_by(self._cancel.signal)}: run the same command again to continue"
        elif fatal is not None:
            number = ExitCode.STOPPED
            message = f"{fatal.message}: fix this, then run the same command again to continue"
        elif any(failure.kind == "defect" for failure in failures):
            number, message = ExitCode.DEFECT, "this is a defect of the program: please report it with the lines above"
        elif failures:
            number = ExitCode.SHARDS_FAILED
            parts = "1 part" if len(failures) == 1 else f"{len(failures)} parts"
            message = f"{parts} of the archives could not be read (see above): replace the archive, then try again"
        for split, plan in self._plans.items():
            failed = sum(failure.split == split for failure in failures)
            if split not in self._splits:
                self._splits[split] = SplitSummary(
                    status="failed" if failed else "incomplete",
                    classes=0,
                    images=0,
                    size_bytes=0,
                    shards=len(plan.shards),
                    shards_skipped=0,
                    shards_failed=failed,
                )
        run = RunSummary(
            exit_code=number,
            splits=self._splits,
            failures=(*failures, *((fatal,) if fatal is not None else ())),
            message=message,
        )
        return ImageSummary(run=run, method=self._method, images=tuple(self._images))
