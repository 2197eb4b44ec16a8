"""Find the number of workers that this storage likes: short trials on the user's own archive and target.

Each trial extracts as many bytes with another number of workers, each from places of the archive that no trial has
read before, into a folder of its own, and counts until everything is on the disk. Nothing is left behind; the folders
are removed at the very end, since some file systems are slow to create files just after others were deleted.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from imagenet_unpack.errors import ArchiveError, StoppedError, TargetError, reason
from imagenet_unpack.extract.worker import Settings, run_shard
from imagenet_unpack.host import pool
from imagenet_unpack.model import Shard, ShardFailed, SplitPlan
from imagenet_unpack.run.executors import LocalExecutor, RunShard
from imagenet_unpack.sources import consumed
from imagenet_unpack.sources.members import Member, iter_members
from imagenet_unpack.sources.reader import WINDOW_BYTES
from imagenet_unpack.sources.tar import TarRun
from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.targets.paths import SplitPaths

WITHIN = 0.03
_WARM_BYTES = 1 << 20
_MIN_RUN_BYTES = 64 << 10
_MAX_RUN_BYTES = 64 << 20
_PART = "0-of-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What one number of workers gave; the time ends when everything is on the disk."""

    workers: int
    window_bytes: int
    size_bytes: int
    images: int
    elapsed_s: float
    cpu_s: float

    @property
    def bytes_per_s(self) -> float:
        """Throughput of the trial."""
        return self.size_bytes / self.elapsed_s


def ladder(cpus: int) -> tuple[int, ...]:
    """Return the numbers of workers to try: 1, 2, 4, ... to four times the CPUs, 16 at least and 64 at most."""
    top = min(64, max(16, 4 * cpus))
    return tuple(number for number in (1, 2, 4, 8, 12, 16, 24, 32, 48, 64) if number <= top)


def run_bytes(archive_bytes: int, sample_bytes: int, numbers: Sequence[int]) -> int:
    """Return how long the runs of a zip, parquet files or an image should be for trials: some for each worker."""
    each_bytes = min(sample_bytes, archive_bytes) // (len(numbers) + 1)
    return max(_MIN_RUN_BYTES, min(_MAX_RUN_BYTES, each_bytes // (4 * max(numbers))))


def recommend(trials: Sequence[Trial]) -> tuple[Trial, Trial]:
    """Return the fewest workers that are within `WITHIN` of the best, and the best."""
    best = max(trials, key=lambda trial: trial.bytes_per_s)
    near = [trial for trial in trials if trial.bytes_per_s >= best.bytes_per_s * (1 - WITHIN)]
    return min(near, key=lambda trial: trial.workers), best


def run_trials(
    plan: SplitPlan,
    target: Path,
    numbers: Sequence[int],
    *,
    sample_bytes: int,
    budget_s: float,
    window_bytes: int = WINDOW_BYTES,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Trial]:
    """Yield a trial for each number of workers, until the budget is used up.

    Args:
        plan: of train.
        target: an existing folder on the storage in question.
        numbers: numbers of workers; the last ones are left out where the archive or the budget is used up.
        sample_bytes: to be extracted in all trials together, at most.
        budget_s: no trial is begun that would end later, as far as the last one tells.
        window_bytes: how much a worker reads at once.
        clock: returns the time in seconds.

    Raises:
        TargetError: the target cannot be written.
        ArchiveError: the archive is too small, damaged or consumed.
        StoppedError: a trial failed.
    """
    consumed.require_whole(plan)
    began_s, last_s = clock(), 0.0
    each_bytes = min(sample_bytes, plan.content_bytes) // (len(numbers) + 1)  # what warms the workers up counts, too
    source = _Pieces(plan) if plan.shards[0].format == "tar" else _Runs(plan)
    try:
        folder = Path(tempfile.mkdtemp(prefix=".imagenet_unpack-tune-", dir=target))
    except OSError as error:
        raise TargetError(f"{target}: cannot be written: {reason(error)}") from error
    try:
        for number in numbers:
            if last_s and clock() - began_s + last_s > budget_s:
                return
            trial_s = clock()
            try:
                trial = _trial(source, folder / str(number), number, each_bytes, window_bytes)
            except _UsedUpError:
                if last_s:
                    return  # what was measured so far is worth a recommendation
                raise ArchiveError("the archive is too small to try it out: give fewer --workers") from None
            yield trial
            last_s = clock() - trial_s
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _UsedUpError(Exception):
    """No member is left that no trial has read."""


class _Pieces:
    """Deals runs of members from all over an archive, never the same one twice."""

    def __init__(self, plan: SplitPlan) -> None:
        self._left = list(plan.shards)
        self._count = 0

    def take(self, size_bytes: int) -> list[Shard]:
        """Return the next run of at least one member and about `size_bytes`, as a shard."""
        while self._left:
            shard = self._left.pop(0)
            end = _end_of_run(shard, size_bytes)
            if end == shard.offset:
                continue
            self._left.append(replace(shard, offset=end))
            self._count += 1
            folder = replace(shard.classes[0], folder=str(self._count))
            return [replace(shard, id=f"piece-{self._count}", end=end, classes=(folder,), payload=TarRun())]
        raise _UsedUpError


class _Runs:
    """Deals the shards of a zip, of parquet files or of an image, from all over them, never the same one twice."""

    def __init__(self, plan: SplitPlan) -> None:
        self._left = list(plan.shards)
        random.Random(0).shuffle(self._left)

    def take(self, size_bytes: int) -> list[Shard]:
        """Return the next shards, at least one and together at least `size_bytes`; their pages leave the cache."""
        taken: list[Shard] = []
        while not taken or sum(shard.size_bytes for shard in taken) < size_bytes:
            if not self._left:
                raise _UsedUpError
            shard = self._left.pop()
            with open(shard.archive.path, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), shard.offset, shard.size_bytes, os.POSIX_FADV_DONTNEED)
            taken.append(shard)
        return taken


def _end_of_run(shard: Shard, size_bytes: int) -> int:
    """Return where a run of whole members from the shard's offset ends; its pages leave the cache."""
    end = shard.offset
    with open(shard.archive.path, "rb", buffering=0) as file:
        fd = file.fileno()
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for entry in iter_members(lambda at, n: os.pread(fd, n, at), shard.offset, shard.end, shard.id):
            if not isinstance(entry, Member):
                break
            end = entry.end
            if end - shard.offset >= size_bytes:
                break
        os.posix_fadvise(fd, shard.offset, end - shard.offset, os.POSIX_FADV_DONTNEED)
    return end


def _trial(source: _Pieces | _Runs, folder: Path, workers: int, size_bytes: int, window_bytes: int) -> Trial:
    pieces = [each for _ in range(2 * workers) for each in source.take(max(1, size_bytes // (2 * workers)))]
    warm = [each for _ in range(workers) for each in source.take(min(_WARM_BYTES, size_bytes // (8 * workers)))]
    place = SplitPaths(folder, "train")
    disk = Disk.for_folder(folder)
    for each in (place.tree, place.fragments):
        each.mkdir(parents=True)
    settings = Settings(
        target=str(folder), part=_PART, run_file="", window_bytes=window_bytes, sync_each_file=disk.sync_each_file
    )
    task = functools.partial(run_shard, settings=settings)
    executor = LocalExecutor(workers)
    try:
        _run(executor, warm, task)
        disk.sync_all(folder)
        cpu_s, began_s = pool.cpu_s(), time.monotonic()
        images, extracted = _run(executor, pieces, task)
        disk.sync_all(folder)
        return Trial(
            workers=workers,
            window_bytes=window_bytes,
            size_bytes=extracted,
            images=images,
            elapsed_s=time.monotonic() - began_s,
            cpu_s=pool.cpu_s() - cpu_s,
        )
    finally:
        executor.close()


def _run(executor: LocalExecutor, shards: list[Shard], task: RunShard) -> tuple[int, int]:
    images = size_bytes = 0
    for outcome in executor.run(iter(shards), task, lambda _: None):
        if isinstance(outcome, ShardFailed):
            raise StoppedError(f"a trial failed: {outcome.message}")
        images += outcome.images
        size_bytes += outcome.size_bytes
    return images, size_bytes
