"""What runs the shards: in this process, or in a pool of joblib's; failures come back as values."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Protocol

from joblib import delayed
from joblib.externals.loky.process_executor import BrokenProcessPool

from imagenet_unpack.host import pool
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
        again: deque[Shard] = deque()
        suspects: deque[Shard] = deque()
        # Taken and without an outcome. joblib takes from a thread of its own, perhaps still while a pool breaks: what
        # is in here when all else is done was lost, too.
        taken: dict[str, Shard] = {}

        def source() -> Iterator[Shard]:
            while again:
                yield again.popleft()
            yield from shards

        while True:
            broken = yield from self._run_pool(source(), run_shard, taken)
            while suspects and not self._killed:
                broke = yield from self._run_pool([suspects.popleft()], run_shard, taken)
                broken = broken or broke
            lost = list(taken.values())
            if not (broken or lost or again or suspects):
                return
            if lost and not self._killed:
                log.warning("a worker process was killed: its shards are tried again in a new pool")
            for shard in lost:
                del taken[shard.id]
                deaths[shard.id] += 1
                done = recover(shard)
                if done is not None:
                    yield done
                elif deaths[shard.id] == MAX_DEATHS and not self._killed:
                    yield failed(shard, "worker-died", f"its worker was killed {MAX_DEATHS} times: out of memory?")
                elif deaths[shard.id] == MAX_DEATHS - 1:
                    suspects.append(shard)
                else:
                    again.append(shard)
            if self._killed:
                for shard in (*again, *suspects):
                    yield failed(shard, "stopped", "dropped as the run was ending")
                return

    def _run_pool(
        self, shards: Iterable[Shard], run_shard: RunShard, taken: dict[str, Shard]
    ) -> Generator[Outcome, None, bool]:
        """Yield outcomes until the shards or the pool end; keep `taken`; return whether the pool broke."""

        def tasks() -> Iterator[object]:
            for shard in shards:
                taken[shard.id] = shard
                yield delayed(run_shard)(shard)

        try:
            for outcome in pool.start(tasks(), self.workers):
                taken.pop(outcome.shard, None)
                yield outcome
        except BrokenProcessPool:
            return True
        return False

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
