"""Pools of worker processes: joblib's loky executor on a fork server, and what its processes do with signals.

The fork server imports what tasks need once, and workers are forked from it: 32 of them are there in 0.4 s, where
starting each interpreter afresh takes 1.4 s and 6 s of CPU time. It has no threads and opens no files of the run.

Each way in which processes can fail to start (no semaphores, no memory, a limit on processes, no temporary folder) is
one error, `CannotStartError`: callers go on in their own process.
"""

from __future__ import annotations

import functools
import gc
import logging
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from typing import TypeVar

from imagenet_unpack.errors import reason
from imagenet_unpack.host.signals import SIGNALS

log = logging.getLogger(__name__)

_PRELOAD = "imagenet_unpack.host.preload"
_START_S = 60.0
# Open files of this process: of a run without workers and of a pool's own, measured with a margin; and of each worker.
_FILES = 32
_FILES_A_WORKER = 2
_CLOSE_S = 5.0
_KILL_S = 2.0

Item = TypeVar("Item")
Result = TypeVar("Result")


class CannotStartError(Exception):
    """Worker processes cannot be started; its text says why."""


class BrokenPoolError(Exception):
    """A worker died, and took the pool with it."""


@contextmanager
def block_signals() -> Iterator[None]:
    """Block the signals that end a run, in this thread and in the threads and processes that it starts meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        # Python's own helper process unblocks SIGINT and SIGTERM in the thread that starts it: start it first. It warns
        # of the semaphores that a killed run left and that it removes.
        if not _hidden_module():
            with suppress(OSError, RuntimeError), _environment(PYTHONWARNINGS="ignore", PYTHONSAFEPATH="1"):
                resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def start_server(*modules: str) -> None:
    """Start the fork server, which gets ready beside this process; errors show when a pool is started.

    Args:
        modules: what the tasks of its workers need.
    """
    with suppress(OSError, RuntimeError, CannotStartError), block_signals():
        _start_server(modules)


def _start_server(modules: Iterable[str]) -> None:
    hidden = _hidden_module()
    if hidden:
        raise CannotStartError(f"{hidden} in the working folder hides Python's module of that name")
    environ = {"PYTHONSAFEPATH": "1"}  # where this process does not look for modules, workers must not either
    package = str(Path(__file__).parents[2])
    if sys.path[0] == package:  # run from a checkout: there, they must
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), package)))
    with _environment(**environ):
        forkserver.set_forkserver_preload([_PRELOAD, *modules])
        forkserver.ensure_running()


@functools.cache
def _hidden_module() -> str:
    """Return what in the working folder has the name of one of Python's modules, if new interpreters look there first.

    From Python 3.11 on PYTHONSAFEPATH keeps them from it.
    """
    if sys.version_info < (3, 11):
        with suppress(OSError), os.scandir(".") as entries:
            for entry in entries:
                name, _, kind = entry.name.partition(".")
                if name in sys.stdlib_module_names and (kind == "py" or entry.is_dir()):
                    return entry.name
    return ""


class Pool:
    """Up to `workers` processes, started as tasks are handed in; the first one is waited for.

    Args:
        workers: how many tasks are run at once, at most.
        modules: what the tasks need; imported once for all workers of this process, so only the first pool's count.

    Raises:
        CannotStartError: there is no worker process to be had.
    """

    def __init__(self, workers: int, *modules: str) -> None:
        try:
            from imagenet_unpack.host import loky  # noqa: PLC0415 - a fifth of a second
        except (ImportError, OSError, MemoryError) as error:
            raise CannotStartError(reason(error)) from error
        self._broken = loky.BrokenProcessPool
        self.workers = min(workers, _workers_for_files())
        _require_semaphores()
        with self._starting():
            _require_working_folder()
            _start_server(modules)
            self._executor = loky.executor(self.workers, initialize_worker)
        self._running = 0
        probe = self.submit(os.getpid)
        try:
            probe.result(timeout=_START_S)
        except (self._broken, TimeoutError, OSError, ImportError, MemoryError) as error:
            self.close()
            raise CannotStartError("they end as soon as they are started") from error

    @contextmanager
    def _starting(self) -> Iterator[None]:
        try:
            with block_signals():
                yield
        except self._broken:  # it was started, and has died since
            raise
        # ImportError: Python without semaphores; RuntimeError: no thread can be started; EOFError: no fork server.
        except (OSError, ImportError, RuntimeError, EOFError, MemoryError) as error:
            raise CannotStartError(reason(error)) from error

    def submit(self, function: Callable[..., Result], *arguments: object) -> Future[Result]:
        """Hand in a call, and start another worker where all have something to do.

        Raises:
            CannotStartError: another worker cannot be started.
            BrokenPoolError: the pool is broken.
        """
        self._running += 1
        executor = self._executor
        try:
            if len(executor._processes) < min(self.workers, self._running):  # noqa: SLF001
                self._start_another()
            with block_signals():
                future: Future[Result] = executor.submit(function, *arguments)
        except self._broken as error:
            raise BrokenPoolError from error
        return future

    def _start_another(self) -> None:
        """Start one more worker, before there is a task for it; where that fails, those that run must do.

        loky starts as many as it may have, so that number is raised one by one.
        """
        executor = self._executor
        executor._max_workers = len(executor._processes) + 1  # noqa: SLF001
        try:
            with self._starting(), executor._flags.shutdown_lock:  # noqa: SLF001
                if executor._flags.broken is not None:  # noqa: SLF001
                    raise executor._flags.broken  # noqa: SLF001
                executor._ensure_executor_running()  # noqa: SLF001
        except CannotStartError as error:
            self.workers = executor._max_workers = len(executor._processes)  # noqa: SLF001
            manager = executor._executor_manager_thread  # noqa: SLF001
            if not self.workers or manager is None or not manager.is_alive():
                self.close()
                raise
            log.warning("no more than %s worker processes can be started (%s)", self.workers, error)

    def wait(self, futures: Iterable[Future[Result]], timeout_s: float) -> set[Future[Result]]:
        """Return the futures that have ended; none after the timeout."""
        done = wait(futures, timeout_s, FIRST_COMPLETED).done
        self._running -= len(done)
        return done

    def result(self, future: Future[Result]) -> Result:
        """Return what an ended call returned.

        Raises:
            BrokenPoolError: its worker, or another one of the pool, died first.
        """
        try:
            return future.result()
        except self._broken as error:
            raise BrokenPoolError from error

    def kill(self) -> None:
        """Kill the workers; may be called from any thread."""
        kill_all()

    def close(self) -> None:
        """End the workers; kill those that do not end by themselves. Never raises."""
        thread = threading.Thread(target=self._shut_down, name="close-pool", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            kill_all()
            return
        thread.join(_CLOSE_S)
        kill_all()
        thread.join(_KILL_S)

    def _shut_down(self) -> None:
        with suppress(Exception):
            self._executor.shutdown(wait=True)


def _workers_for_files() -> int:
    """Return how many workers the limit on open files allows.

    Raises:
        CannotStartError: none.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit < _FILES + _FILES_A_WORKER:
        raise CannotStartError(f"only {limit} open files are allowed (`ulimit -n`)")
    return (limit - _FILES) // _FILES_A_WORKER


def _require_semaphores() -> None:
    try:
        multiprocessing.Lock()
    except (OSError, ImportError) as error:
        raise CannotStartError(f"no semaphore can be created in /dev/shm: {reason(error)}") from error


def _require_working_folder() -> None:
    """Leave a working folder that was removed: processes cannot be started in it, and no path can be relative to it."""
    try:
        os.getcwd()
    except FileNotFoundError:
        os.chdir("/")


def kill_all() -> None:
    """Kill every worker process of this process."""
    for process in multiprocessing.active_children():
        with suppress(OSError):
            process.kill()


def map_unordered(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, *modules: str
) -> Iterator[Result]:
    """Yield the result for each item as it comes: from worker processes, or from this one where there are none."""
    items = iter(items)
    running: dict[Future[Result], Item] = {}
    left: list[Item] = []
    pool = None
    try:
        pool = Pool(workers, *modules)
        while True:
            while len(running) < 2 * workers and (item := next(items, None)) is not None:
                left.append(item)
                running[pool.submit(function, item)] = left.pop()
            if not running:
                return
            for future in pool.wait(running, _START_S):
                result = pool.result(future)
                del running[future]
                yield result
    except (CannotStartError, BrokenPoolError):
        pass
    finally:
        if pool is not None:
            pool.close()
    for item in (*running.values(), *left):
        yield function(item)
    yield from map(function, items)


def initialize_worker() -> None:
    """Leave signals to the parent (they reach the whole process group), and end with it.

    A worker whose parent was killed would otherwise finish what was handed to it, for tens of seconds.
    """
    gc.freeze()  # what was forked stays shared with the fork server: a collection would touch, and so copy, all of it
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def cpu_s() -> float:
    """Return the CPU seconds that this process and its living workers have used."""
    import psutil  # noqa: PLC0415 - for `tune` alone

    total = 0.0
    for number in (os.getpid(), *(process.pid for process in multiprocessing.active_children())):
        with suppress(psutil.Error, OSError):
            times = psutil.Process(number).cpu_times()
            total += times.user + times.system
    return total
