"""What runs the shards: in this process, or in a pool of joblib's; failures come back as values."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain
from typing import Protocol

from joblib import delayed
from joblib.externals.loky.process_executor import BrokenProcessPool

from imagenet_unpack import pool
from imagenet_unpack.model import Outcome, Shard, ShardDone, ShardFailed

MAX_DEATHS = 3
log = logging.getLogger(__name__)

RunShard = Callable[[Shard], Outcome]
"""A picklable callable that never raises."""


class Executor(Protocol):
    """Runs shards and yields their outcomes in whatever order they end."""

    @property
    def workers(self) -> int:
        """How many shards are run at once."""
        ...

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
        shards = iter(shards)
        deaths: Counter[str] = Counter()
        again: list[Shard] = []
        while True:
            suspects = [shard for shard in again if deaths[shard.id] == MAX_DEATHS - 1]
            bystanders = [shard for shard in again if deaths[shard.id] < MAX_DEATHS - 1]
            lost, broken = yield from self._run_pool(chain(bystanders, shards), run_shard)
            for suspect in suspects:
                more, broke = yield from self._run_pool([suspect], run_shard)
                lost, broken = lost + more, broken or broke
            if not broken:
                return
            if not self._killed:
                log.warning("a worker process was killed: its shards are tried again in a new pool")
            again = []
            for shard in lost:
                deaths[shard.id] += 1
                done = recover(shard)
                if done is not None:
                    yield done
                elif self._killed:
                    yield failed(shard, "stopped", "dropped as the run was ending")
                elif deaths[shard.id] == MAX_DEATHS:
                    yield failed(shard, "worker-died", f"its worker was killed {MAX_DEATHS} times: out of memory?")
                else:
                    again.append(shard)
            if self._killed:
                return

    def _run_pool(
        self, shards: Iterable[Shard], run_shard: RunShard
    ) -> Generator[Outcome, None, tuple[list[Shard], bool]]:
        """Yield outcomes until the shards or the pool end; return the shards that were lost and whether it broke."""
        running: dict[str, Shard] = {}

        def tasks() -> Iterator[object]:
            for shard in shards:
                running[shard.id] = shard
                yield delayed(run_shard)(shard)

        broken = False
        try:
            for outcome in pool.start(tasks(), self.workers):
                running.pop(outcome.shard, None)
                yield outcome
        except BrokenProcessPool:
            broken = True
        return list(running.values()), broken

    def kill(self) -> None:
        """See `Executor.kill`."""
        self._killed = True
        pool.kill()

    def close(self) -> None:
        """See `Executor.close`."""
        pool.close()


def failed(shard: Shard, kind: str, message: str) -> ShardFailed:
    """Return the outcome of a shard that was not finished."""
    return ShardFailed(shard=shard.id, split=shard.split, kind=kind, message=message)
