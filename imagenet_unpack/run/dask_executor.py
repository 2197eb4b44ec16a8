"""Runs the shards on a Dask cluster, through `distributed`'s own futures (joblib's Dask backend can wait for ever)."""

from __future__ import annotations

import logging
import platform
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from imagenet_unpack import __version__
from imagenet_unpack.errors import StoppedError, TargetError, UsageError
from imagenet_unpack.model import Outcome, Shard
from imagenet_unpack.run.executors import MAX_DEATHS, Recover, RunShard, failed

_CONNECT_S = 20
_POLL_S = 0.01
_WATCH_S = 1.0
log = logging.getLogger(__name__)


def versions() -> tuple[str, str]:
    """Return the versions (Python's, this program's) that client and workers must share."""
    return platform.python_version().rpartition(".")[0], __version__


class DaskExecutor:
    """Runs the shards on the workers of a Dask cluster that is there already.

    Only as many shards are handed over as there are threads and a few more, so that a run that ends leaves little to
    be dropped. A result is released as soon as it is read: the scheduler would run the task again when the worker that
    holds it dies. A shard whose worker died `MAX_DEATHS` times fails.

    Args:
        address: of the scheduler, or None.
        scheduler_file: the file that it wrote, or None.
        stall_timeout_s: how long to wait while there is no worker.
        connect_timeout_s: how long to wait for the scheduler.
        wanted: the versions that workers must have; None: those of this process.

    Raises:
        UsageError: `distributed` is not installed.
        TargetError: the scheduler cannot be reached, or a worker has other versions.
    """

    def __init__(
        self,
        address: str | None,
        scheduler_file: str | None,
        *,
        stall_timeout_s: float,
        connect_timeout_s: float = _CONNECT_S,
        wanted: tuple[str, str] | None = None,
    ) -> None:
        try:
            import distributed  # noqa: PLC0415 - an extra
        except ImportError:
            raise UsageError("--executor dask needs the extra: pip install 'imagenet_unpack[dask]'") from None
        self._distributed: Any = distributed
        self._stall_timeout_s = stall_timeout_s
        self._killed = False
        self._closed = False
        self._threads = 0
        for name in ("distributed", "tornado", "asyncio"):  # what is lost is told here, in one line
            logging.getLogger(name).setLevel(logging.CRITICAL)
        where = address or scheduler_file
        try:
            self._client = self._distributed.Client(
                address, scheduler_file=scheduler_file, timeout=connect_timeout_s, set_as_default=False
            )
        except (OSError, TimeoutError, ValueError) as error:
            raise TargetError(f"the Dask scheduler {where} cannot be reached ({error}): is it running?") from None
        try:
            self._require_versions(wanted or versions())
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> int:
        """Number of threads of the cluster now, or when there were some last."""
        if not self._closed and self._client.status == "running":
            with suppress(Exception):  # the scheduler may be gone
                self._threads = sum(self._client.nthreads().values()) or self._threads
        return self._threads

    def _require_versions(self, wanted: tuple[str, str]) -> None:
        try:
            found = self._client.run(versions, on_error="return")
        except Exception as error:  # noqa: BLE001 - whatever the workers' own interpreters raise
            raise TargetError(f"the Dask workers cannot run this program: {error}") from None
        for worker, theirs in found.items():
            if theirs != wanted:
                mine = "Python {}, imagenet_unpack {}".format(*wanted)
                raise TargetError(f"the Dask worker {worker} has other versions ({theirs!r}) than this client ({mine})")

    def run(self, shards: Iterator[Shard | None], run_shard: RunShard, recover: Recover) -> Iterator[Outcome]:
        """See `executors.Executor.run`.

        Raises:
            StoppedError: there was no worker for the stall timeout, or the scheduler is gone.
        """
        ended = False
        deaths: Counter[tuple[str, str]] = Counter()
        running: dict[Any, Shard] = {}
        completed = self._distributed.as_completed(loop=self._client.loop, raise_errors=False)
        watch = _Watch(self._client, self._stall_timeout_s)

        def submit(shard: Shard) -> None:
            # pure=False: the same shard may be run again. The key carries its name into the dashboard.
            key = f"{shard.split}-{shard.id}-{time.monotonic_ns()}"
            future = self._client.submit(run_shard, shard, pure=False, key=key)
            running[future] = shard
            completed.add(future)

        while True:
            threads = watch.threads()
            while not ended and len(running) < threads + max(1, threads // 8):
                try:
                    new = next(shards)
                except StopIteration:
                    ended = True
                    break
                if new is None:
                    break
                submit(new)
            if ended and not running:
                return
            if not completed.has_ready():
                time.sleep(_POLL_S)
                continue
            future = next(completed)
            shard = running.pop(future)
            try:
                if future.status == "finished":
                    yield future.result()
                    continue
                if self._killed or future.cancelled():
                    watch.threads(now=True)  # the scheduler's end cancels everything
                    yield failed(shard, "stopped", "dropped as the run was ending")
                    continue
            finally:
                future.release()
            deaths[shard.split, shard.id] += 1
            done = recover(shard)
            if done is not None:
                yield done
            elif deaths[shard.split, shard.id] >= MAX_DEATHS:
                yield failed(shard, "worker-died", f"its worker was lost {MAX_DEATHS} times: out of memory?")
            else:
                log.warning("a Dask worker was lost: its shards are tried again")
                submit(shard)

    def kill(self) -> None:
        """See `executors.Executor.kill`: what runs reads the run file by itself."""
        self._killed = True

    def close(self) -> None:
        """See `executors.Executor.close`; the cluster stays."""
        if not self._closed:
            self._threads = self.workers
            self._closed = True
            with suppress(Exception):
                self._client.close(timeout=2)


class _Watch:
    """Looks at the cluster now and then: is the scheduler there, are there workers."""

    def __init__(self, client: Any, stall_timeout_s: float) -> None:
        self._client = client
        self._stall_timeout_s = stall_timeout_s
        self._looked_s = float("-inf")
        self._seen_s = time.monotonic()
        self._threads = 0
        self._told = False

    def threads(self, *, now: bool = False) -> int:
        """Return how many threads there were at the last look.

        Raises:
            StoppedError: the scheduler is gone, or there was no worker for the stall timeout.
        """
        now_s = time.monotonic()
        if not now and now_s - self._looked_s < _WATCH_S:
            return self._threads
        self._looked_s = now_s
        if self._client.status != "running":
            raise StoppedError(
                "the Dask scheduler is gone: start it again, then run the same command again to continue"
            )
        self._threads = 0
        with suppress(OSError, TimeoutError):
            self._threads = sum(self._client.nthreads().values())
        if self._threads:
            self._seen_s = now_s
            if self._told:
                log.warning("a Dask worker is there: going on")
        elif not self._told:
            log.warning("the Dask cluster has no worker: waiting for one")
        elif now_s - self._seen_s > self._stall_timeout_s:
            raise StoppedError(
                "the Dask cluster had no worker within --stall-timeout: run the same command again to continue"
            )
        self._told = not self._threads
        return self._threads
