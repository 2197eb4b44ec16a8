"""Runs the shards of an image and describes its classes as they become known."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.extract import throttle
from imagenet_unpack.extract.imaging import ImageSettings, image_shard, is_packed, recover, shard_key
from imagenet_unpack.extract.locating import Together, locate_shards, recover_located
from imagenet_unpack.extract.throttle import Limits
from imagenet_unpack.extract.worker import Settings
from imagenet_unpack.host import resources
from imagenet_unpack.host.status import Monitor, StatusFile
from imagenet_unpack.model import Outcome, Shard, ShardDone, ShardFailed
from imagenet_unpack.reporter import Reporter
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.run.executors import Executor
from imagenet_unpack.run.imagejob import Job
from imagenet_unpack.run.imageplan import Assembler
from imagenet_unpack.run.imagestream import completed, stream_copies
from imagenet_unpack.targets.runfile import RunFile

TABLES_BYTES = 1 << 20
_COMMIT_S = 5.0
_TOGETHER = 8


class Reading:
    """Runs shards; keeps what failed.

    Attributes:
        fatal: the outcome that ended the run, or None.
        failures: shards and classes that are at fault.

    Args:
        executor: runs the shards.
        reporter: shows the progress; safe to be called from two threads.
        cancel: is asked whether to go on.
        limits: rates and thresholds; thresholds of -1 are the default.
    """

    def __init__(self, executor: Executor, reporter: Reporter, cancel: Cancel, limits: Limits) -> None:
        self.fatal: ShardFailed | None = None
        self.failures: list[ShardFailed] = []
        self._executor = executor
        self._reporter = reporter
        self._cancel = cancel
        self._given = limits
        self._status = StatusFile.create()
        self._stuck = False
        self._monitor = Monitor(self._status, self._advance, reporter.waiting)

    @property
    def sound(self) -> bool:
        """Whether nothing has failed and the run is to go on."""
        return not (self.failures or self._cancel.requested)

    def close(self) -> None:
        """End the workers."""
        self._executor.close()
        self._status.close()

    @property
    def workers(self) -> int:
        """How many workers there are."""
        return self._executor.workers

    def prepare(self, job: Job, stack: ExitStack) -> Settings:
        """Return what every shard of a job shares; signals and progress are looked after until the stack is closed."""
        run_file = RunFile.create_in(job.state.folder)
        stack.callback(run_file.remove)
        stack.enter_context(self._cancel.workers(stop=run_file.stop, kill=self._executor.kill))
        stack.enter_context(self._monitor.running())
        return Settings(
            target=str(job.state.folder),
            part="0-of-1",
            run_file=str(run_file.path),
            status=self._status.path,
            limits=self._limits(job),
        )

    def run(self, job: Job, settings: Settings, assembler: Assembler | None, image_fd: int) -> None:
        """Run the shards that are not done, and describe the classes (if that is possible) as they become known."""
        shards_in_order = job.todo if assembler is None else assembler.order
        order = [shard for shard in shards_in_order if shard_key(shard) not in job.done]
        order = [replace(shard, slot=slot) for slot, shard in enumerate(order)]
        if not order:
            self.describe(job, assembler)
            return
        copying = job.method == "copy"
        image_settings = ImageSettings(
            run=settings,
            folder=str(job.state.folder),
            copy_to=str(job.state.image) if copying else "",
            shifts=job.data.shifts if copying else {},
        )
        task = functools.partial(image_shard if copying else locate_shards, settings=image_settings)
        look = functools.partial(recover if copying else recover_located, folder=job.state.folder)
        what = "copying" if copying else "reading headers"
        self._reporter.phase(what, sum(shard.size_bytes for shard in order), None)

        together = 1 if copying else min(_TOGETHER, -(-len(order) // self._executor.workers) or 1)
        groups = [tuple(order[at : at + together]) for at in range(0, len(order), together)]
        group_of = {shard_key(shard): group for group in groups for shard in group}

        def shards() -> Iterator[Shard]:
            for group in groups:
                if self._cancel.requested or self._stuck:
                    return
                for shard in group:
                    self._monitor.begin(shard.slot)
                yield group[0] if len(group) == 1 else replace(group[0], payload=Together(shards=group))

        committed = time.monotonic()
        self.describe(job, assembler)
        for outcome in self._executor.run(shards(), task, look):
            self._collect(job, outcome, group_of[f"{outcome.split}.{outcome.shard}"])
            job.append_packed(image_fd)
            self.describe(job, assembler)
            if copying and job.uncommitted and time.monotonic() - committed > _COMMIT_S:
                self._commit(job)
                committed = time.monotonic()
        if copying and job.uncommitted:
            self._commit(job)

    def read_streams(self, job: Job, settings: Settings, image_fd: int, *, classes_named: bool) -> None:
        """Copy what is read from streams, and complete the plans of their splits.

        Args:
            job: all its other shards are done.
            settings: as `prepare` returned them.
            image_fd: the image.
            classes_named: the classes were asked for by name.

        Raises:
            ArchiveError: what was asked for is not there.
            LabelError: an image has no label, or one that contradicts another.
        """
        copies = stream_copies(job.plans, slot=sum(len(plan.shards) for plan in job.plans))
        sizes = [copy.source.archive.size_bytes for copy in copies]
        self._reporter.phase("copying", sum(sizes) if all(sizes) else None, None)
        for copy in copies:
            copy.at = job.at
            self._monitor.begin(copy.slot)
            outcome = copy.run(image_fd, job.state.folder, settings, self._advance)
            shown = self._monitor.end(copy.slot)
            if copy.label_error is not None:
                raise copy.label_error
            for fault in copy.faults:
                self._fail(fault)
            if isinstance(outcome, ShardDone):
                self._advance(outcome.size_bytes - shown.size_bytes, 0)
                for note in copy.notes:
                    self._reporter.note(note)
            elif outcome.fatal:
                self.fatal = outcome
                self._cancel.request()
            elif outcome.kind != "stopped":
                self._fail(outcome)
            if not self.sound:
                return
            job.extend(copy.shifts, copy.at)
        shards = [shard for copy in copies for shard in copy.shards]
        job.plans = completed(job.plans, shards, classes_named=classes_named, note=self._reporter.note)

    def describe(self, job: Job, assembler: Assembler | None) -> None:
        """Describe what can be described; an archive that turns out to be at fault is a failure."""
        if assembler is None or not self.sound:
            return
        try:
            assembler.advance(job.done)
        except ArchiveError as error:
            split = job.plans[0].split
            self.failures.append(ShardFailed(shard="", split=split, kind="archive", message=str(error)))
            self._reporter.note(str(error))

    def _collect(self, job: Job, outcome: Outcome, shards: tuple[Shard, ...]) -> None:
        """Record the outcome of shards that were run together."""
        shown = [self._monitor.end(shard.slot) for shard in shards]
        shown_bytes, shown_images = sum(each.size_bytes for each in shown), sum(each.images for each in shown)
        if isinstance(outcome, ShardFailed):
            if shown_bytes or shown_images:
                self._advance(-shown_bytes, -shown_images)
            if outcome.fatal:
                if self.fatal is None:
                    self.fatal = outcome
                    self._cancel.request()
            elif outcome.kind != "stopped":
                self._stuck |= any(map(is_packed, shards))  # nothing behind them can be placed
                self._fail(outcome)
            return
        nbytes = sum(shard.size_bytes for shard in shards) - shown_bytes
        self._reporter.advance(nbytes=nbytes, images=outcome.images - shown_images, shards=len(shards))
        for note in outcome.notes:
            self._reporter.note(note)
        for shard in shards:
            if is_packed(shard):
                job.arrived.add(shard_key(shard))
            else:
                job.done.add(shard_key(shard))
                job.uncommitted.append(shard_key(shard))

    def _fail(self, failure: ShardFailed) -> None:
        self.failures.append(failure)
        self._reporter.note(f"{failure.split} shard {failure.shard} failed: {failure.message}")

    def _advance(self, nbytes: int, images: int) -> None:
        self._reporter.advance(nbytes=nbytes, images=images, shards=0)

    def _commit(self, job: Job) -> None:
        job.state.commit(job.uncommitted)
        job.uncommitted = []

    def _limits(self, job: Job) -> Limits:
        needed = job.unreserved_bytes(self.workers)
        needed += 0 if job.method == "copy" else TABLES_BYTES  # plain tars are copied to room that is reserved
        room = resources.room(job.state.folder, content_bytes=needed, files=0)
        return throttle.with_defaults(self._given, room, resources.memory())
