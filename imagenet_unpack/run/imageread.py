"""Runs the shards of an image and describes its classes as they become known."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.extract import throttle
from imagenet_unpack.extract.imaging import ImageSettings, Together, image_shard, recover, shard_key
from imagenet_unpack.extract.throttle import Limits
from imagenet_unpack.extract.worker import Settings
from imagenet_unpack.host import resources
from imagenet_unpack.host.status import Monitor, StatusFile
from imagenet_unpack.model import Outcome, Shard, ShardFailed
from imagenet_unpack.reporter import Reporter
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.run.executors import Executor
from imagenet_unpack.run.imagejob import Job
from imagenet_unpack.run.imageplan import Assembler
from imagenet_unpack.run.runner import COMMIT_S, DEFAULT
from imagenet_unpack.targets.runfile import RunFile

TABLES_BYTES = 1 << 20
_TOGETHER = 4


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
        self._monitor = Monitor(self._status, self._advance, reporter.waiting)

    @property
    def sound(self) -> bool:
        """Whether nothing has failed and the run is to go on."""
        return not (self.failures or self._cancel.requested)

    def close(self) -> None:
        """End the workers."""
        self._executor.close()
        self._status.close()

    def run(self, job: Job, assembler: Assembler | None, stack: ExitStack) -> None:
        """Run the shards that are not done, and describe the classes (if that is possible) as they become known."""
        shards_in_order = job.todo if assembler is None else assembler.order
        order = [shard for shard in shards_in_order if shard_key(shard) not in job.done]
        order = [replace(shard, slot=slot) for slot, shard in enumerate(order)]
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

        together = 1 if copying else min(_TOGETHER, -(-len(order) // self._executor.workers) or 1)
        groups = [tuple(order[at : at + together]) for at in range(0, len(order), together)]
        group_of = {shard_key(shard): group for group in groups for shard in group}

        def shards() -> Iterator[Shard]:
            for group in groups:
                if self._cancel.requested:
                    return
                for shard in group:
                    self._monitor.begin(shard.slot)
                yield group[0] if len(group) == 1 else replace(group[0], payload=Together(shards=group))

        committed = time.monotonic()
        self.describe(job, assembler)
        for outcome in self._executor.run(shards(), task, functools.partial(recover, folder=job.state.folder)):
            self._collect(job, outcome, group_of[f"{outcome.split}.{outcome.shard}"])
            self.describe(job, assembler)
            if copying and job.uncommitted and time.monotonic() - committed > COMMIT_S:
                self._commit(job)
                committed = time.monotonic()
        if copying and job.uncommitted:
            self._commit(job)

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
                self.failures.append(outcome)
                self._reporter.note(f"{outcome.split} shard {outcome.shard} failed: {outcome.message}")
            return
        nbytes = sum(shard.size_bytes for shard in shards) - shown_bytes
        self._reporter.advance(nbytes=nbytes, images=outcome.images - shown_images, shards=len(shards))
        for note in outcome.notes:
            self._reporter.note(note)
        keys = [shard_key(shard) for shard in shards]
        job.done.update(keys)
        job.uncommitted += keys

    def _advance(self, nbytes: int, images: int) -> None:
        self._reporter.advance(nbytes=nbytes, images=images, shards=0)

    def _commit(self, job: Job) -> None:
        job.state.commit(job.uncommitted)
        job.uncommitted = []

    def _limits(self, job: Job) -> Limits:
        limits = self._given
        if limits.free_space == DEFAULT:
            room = resources.room(job.state.folder, content_bytes=0, files=0)
            needed = 0 if job.method == "copy" else TABLES_BYTES  # copied to is room that is reserved already
            limits = replace(limits, free_space=throttle.default_free_space(room.bytes_total, room.bytes_free, needed))
        if limits.free_memory == DEFAULT:
            limits = replace(limits, free_memory=throttle.default_free_memory(resources.memory().total))
        return limits
