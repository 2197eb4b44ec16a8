"""What runs the shards: in this process, or in a pool of joblib's. One small interface; failures come back as values."""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import psutil
from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import BrokenProcessPool

from imagenet_unpack.model import Outcome, Shard, ShardDone, ShardFailed
from imagenet_unpack.worker import initialize_worker

_MAX_DEATHS = 3
log = logging.getLogger(__name__)

RunShard = Callable[[Shard], Outcome]
"""A picklable callable that never raises."""


class Executor(Protocol):
    """Runs shards and yields their outcomes in whatever order they end."""

    workers: int

    def run(
        self, shards: Iterable[Shard], run_shard: RunShard, recover: Callable[[Shard], ShardDone | None]
    ) -> Iterator[Outcome]:
        """Yield exactly one outcome for each shard.

        Args:
            shards: taken one by one as workers come free, so that the caller can stop by ending it.
            run_shard: what to call.
            recover: tells whether a shard whose outcome was lost had in fact been finished.
        """
        ...

    def kill(self) -> None:
        """End the workers at once; outcomes of their shards are `stopped`."""
        ...

    def close(self) -> None:
        """End the workers and wait for them."""
        ...


class SerialExecutor:
    """Runs the shards in this process."""

    workers = 1

    def run(
        self, shards: Iterable[Shard], run_shard: RunShard, recover: Callable[[Shard], ShardDone | None]
    ) -> Iterator[Outcome]:
        """See `Executor.run`."""
        return map(run_shard, shards)

    def kill(self) -> None:
        """Nothing to end."""

    def close(self) -> None:
        """Nothing to end."""


class LocalExecutor:
    """Runs the shards in a pool of processes (joblib with loky).

    A worker that dies takes the pool with it, and results that were not read yet: what the disk shows to be finished
    counts, the rest is tried again in a new pool. A shard that lost two pools is tried alone, so that it cannot take
    others with it, and fails with the third.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._killed = False

    def run(
        self, shards: Iterable[Shard], run_shard: RunShard, recover: Callable[[Shard], ShardDone | None]
    ) -> Iterator[Outcome]:
        """See `Executor.run`."""
        deaths: Counter[str] = Counter()
        again: list[Shard] = []
        lost = yield from self._run_pool(shards, run_shard)
        while lost:
            for shard in lost:
                deaths[shard.id] += 1
                done = recover(shard)
                if done is not None:
                    yield done
                elif self._killed or deaths[shard.id] >= _MAX_DEATHS:
                    yield ShardFailed(
                        shard=shard.id,
                        split=shard.split,
                        kind="stopped" if self._killed else "worker-died",
                        message="dropped as the run was ending"
                        if self._killed
                        else f"its worker process was killed {_MAX_DEATHS} times: out of memory?",
                    )
                else:
                    again.append(shard)
            if not self._killed:
                log.warning("a worker process was killed; its shards are tried again")
            again.sort(key=lambda shard: deaths[shard.id])
            suspects = [shard for shard in again if deaths[shard.id] >= _MAX_DEATHS - 1]
            if suspects and len(suspects) == len(again):
                group, again = suspects[:1], suspects[1:]
            else:
                group, again = again[: len(again) - len(suspects)], suspects
            lost = yield from self._run_pool(group, run_shard)
            if not lost:
                # whatever the caller still has to give goes on beside the suspects
                lost = yield from self._run_pool(shards, run_shard)
            if not lost and again:
                lost, again = again, []
                for shard in lost:
                    deaths[shard.id] -= 1  # not lost again, just due

    def _run_pool(self, shards: Iterable[Shard], run_shard: RunShard) -> Iterator[Outcome]:  # type: ignore[misc]
        """Yield outcomes until the shards or the pool end; return the shards whose outcomes were lost."""
        waiting: dict[str, Shard] = {}

        def tasks() -> Iterator[object]:
            for shard in shards:
                if self._killed:
                    waiting[shard.id] = shard
                    return
                waiting[shard.id] = shard
                yield delayed(run_shard)(shard)

        parallel = Parallel(
            n_jobs=max(self.workers, 2),  # joblib runs a pool of one in this process
            backend="loky",
            return_as="generator_unordered",
            pre_dispatch="n_jobs",
            batch_size=1,
            initializer=initialize_worker,
            initargs=(os.getpid(),),
        )
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="A worker stopped while some jobs", category=UserWarning)
                for outcome in parallel(tasks()):
                    waiting.pop(outcome.shard, None)
                    yield outcome
        except BrokenProcessPool:
            pass
        return list(waiting.values())

    def kill(self) -> None:
        """See `Executor.kill`."""
        self._killed = True
        for child in psutil.Process().children(recursive=True):
            try:
                child.kill()
            except psutil.Error:
                continue

    def close(self) -> None:
        """See `Executor.close`."""
        get_reusable_executor(max_workers=1, reuse=True).shutdown(wait=True, kill_workers=True)
