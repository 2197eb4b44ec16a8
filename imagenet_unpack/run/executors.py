"""What runs the shards: this process, or worker processes; failures come back as values."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol

from imagenet_unpack.host.pool import BrokenPoolError, CannotStartError, Pool
from imagenet_unpack.model import Outcome, Shard, ShardDone, ShardFailed

MAX_DEATHS = 3
IDLE_S = 0.02
_WAIT_S = 0.5
WORKER_MODULE = "imagenet_unpack.extract.worker"
log = logging.getLogger(__name__)

RunShard = Callable[[Shard], Outcome]
"""A picklable callable that never raises."""

Recover = Callable[[Shard], ShardDone | None]
"""Tells whether a shard whose outcome was lost had in fact been finished."""


class Executor(Protocol):
    """Runs shards and yields their outcomes in whatever order they end."""

    @property
    def workers(self) -> int:
        """How many shards are run at once."""
        ...

    def run(self, shards: Iterator[Shard | None], run_shard: RunShard, recover: Recover) -> Iterator[Outcome]:
        """Yield exactly one outcome for each shard.

        Args:
            shards: asked for the next one in this thread whenever there is room for another; None: none at the moment.
                Its end is the end of the work, so that the caller can stop by ending it.
            run_shard: what to call.
            recover: is asked where an outcome was lost.
        """
        ...

    def kill(self) -> None:
        """Kill the workers, from any thread; outcomes of their shards are `stopped`."""
        ...

    def close(self) -> None:
        """End the workers and wait for them; never raises."""
        ...


class SerialExecutor:
    """Runs the shards in this process."""

    workers = 1

    def run(self, shards: Iterator[Shard | None], run_shard: RunShard, recover: Recover) -> Iterator[Outcome]:
        """See `Executor.run`."""
        for shard in shards:
            if shard is None:
                time.sleep(IDLE_S)
            else:
                yield run_shard(shard)

    def kill(self) -> None:
        """Nothing to kill."""

    def close(self) -> None:
        """Nothing to end."""


class ThreadExecutor:
    """Runs shards that are in memory in threads of this process."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def run(self, shards: Iterator[Shard | None], run_shard: RunShard, recover: Recover) -> Iterator[Outcome]:
        """See `Executor.run`."""
        running: set[Future[Outcome]] = set()
        ended = False
        with ThreadPoolExecutor(self.workers, "writer") as pool:
            while running or not ended:
                while not ended and len(running) < self.workers:
                    shard = next(shards, self)
                    if isinstance(shard, ThreadExecutor):
                        ended = True
                    elif shard is None:
                        break
                    else:
                        running.add(pool.submit(run_shard, shard))
                full = ended or len(running) == self.workers
                done, running = wait(running, _WAIT_S if full else 0, FIRST_COMPLETED)
                for future in done:
                    yield future.result()

    def kill(self) -> None:
        """Nothing to kill: the threads look at the run file."""

    def close(self) -> None:
        """Nothing to end."""


class LocalExecutor:
    """Runs the shards in worker processes of this host (joblib's loky).

    A worker that dies takes its pool with it: a shard whose fragment shows that it was finished counts, the others are
    tried again in a new pool. A shard that lost two pools is tried alone, so that it cannot take others with it, and
    fails with the third. Where no worker process can be started, the shards are run in this process.
    """

    def __init__(self, workers: int) -> None:
        self._wanted = workers
        self._pool: Pool | None = None
        self._serial = False
        self._killed = False

    @property
    def workers(self) -> int:
        """See `Executor.workers`; 1 once worker processes have turned out to be impossible."""
        return 1 if self._serial else self._wanted

    def run(self, shards: Iterator[Shard | None], run_shard: RunShard, recover: Recover) -> Iterator[Outcome]:
        """See `Executor.run`."""
        books = _Books(shards)
        while not self._serial and not (books.running or self._killed or books.finished):
            self._hand_out(books, run_shard)
            while books.running:
                yield from self._collect(books, recover)
                self._hand_out(books, run_shard)
            books.alone = False
            time.sleep(0 if self._serial or books.finished else IDLE_S)
        while not (self._killed or books.finished):
            shard = books.next()
            books.alone = False
            if shard is None:
                time.sleep(IDLE_S)
            else:
                yield run_shard(shard)
        for shard in books.given_up():
            yield failed(shard, "stopped", "dropped as the run was ending")

    def _hand_out(self, books: _Books, run_shard: RunShard) -> None:
        """Give the pool as many shards as it has workers, and as many in reserve, so that none is idle meanwhile."""
        while not (self._killed or self._serial) and len(books.running) < 2 * self.workers:
            shard = books.next()
            if shard is None:
                return
            try:
                if self._pool is None:
                    self._pool = Pool(self._wanted, WORKER_MODULE)
                books.running[self._pool.submit(run_shard, shard)] = shard
            except BrokenPoolError:
                books.again.appendleft(shard)
                if not books.running:
                    self._close_pool()
                return
            except CannotStartError as error:
                books.again.appendleft(shard)
                self._serial = True
                log.warning("worker processes cannot be started (%s): continuing in one process", error)

    def _collect(self, books: _Books, recover: Recover) -> Iterator[Outcome]:
        """Wait for outcomes; decide what becomes of the shards of a pool that broke."""
        assert self._pool is not None
        lost = []
        for future in self._pool.wait(books.running, _WAIT_S):
            shard = books.running.pop(future)
            try:
                yield self._pool.result(future)
            except BrokenPoolError:
                lost.append(shard)
        if not lost:
            return
        for future, shard in tuple(books.running.items()):  # the pool is gone: what was returned before counts
            del books.running[future]
            try:
                yield self._pool.result(future)
            except BrokenPoolError:
                lost.append(shard)
        self._close_pool()
        if not self._killed:
            log.warning("a worker process was killed: its shards are tried again")
        for shard in lost:
            done = recover(shard)
            if done is not None:
                yield done
            elif books.lost(shard) == MAX_DEATHS and not self._killed:
                yield failed(shard, "worker-died", f"its worker was killed {MAX_DEATHS} times: out of memory?")

    def _close_pool(self) -> None:
        if self._pool is not None:
            self._pool.close()
        self._pool = None

    def kill(self) -> None:
        """See `Executor.kill`."""
        self._killed = True
        if self._pool is not None:
            self._pool.kill()

    def close(self) -> None:
        """See `Executor.close`."""
        self._close_pool()


class _Books:
    """Where each shard is: still to come, running, or to be tried again, by itself where it may be what kills workers.

    Attributes:
        alone: the shard that runs is to have the pool for itself.
    """

    def __init__(self, shards: Iterator[Shard | None]) -> None:
        self.running: dict[Future[Outcome], Shard] = {}
        self.again: deque[Shard] = deque()
        self.alone = False
        self._shards = shards
        self._ended = False
        self._suspects: deque[Shard] = deque()
        self._deaths: Counter[tuple[str, str]] = Counter()

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to run."""
        return self._ended and not (self.running or self.again or self._suspects)

    def next(self) -> Shard | None:
        """Return the next shard to run; None: none at the moment."""
        if self.alone:
            return None
        if self.again:
            return self.again.popleft()
        if not self._ended:
            try:
                shard = next(self._shards)
            except StopIteration:
                self._ended = True
            else:
                if shard is not None:
                    return shard
        if self._suspects and not self.running:
            self.alone = True
            return self._suspects.popleft()
        return None

    def lost(self, shard: Shard) -> int:
        """Return how often the shard's pool broke by now; unless that is too often, it will be tried again."""
        self._deaths[shard.split, shard.id] += 1
        deaths = self._deaths[shard.split, shard.id]
        if deaths < MAX_DEATHS:
            (self._suspects if deaths == MAX_DEATHS - 1 else self.again).append(shard)
        return deaths

    def given_up(self) -> list[Shard]:
        """Return the shards that were taken and not finished."""
        return [*self.again, *self._suspects]


def failed(shard: Shard, kind: str, message: str) -> ShardFailed:
    """Return the outcome of a shard that was not finished."""
    return ShardFailed(shard=shard.id, split=shard.split, kind=kind, message=message)
