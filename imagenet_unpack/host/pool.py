"""Pools of worker processes (joblib with loky): how they are made, what their processes do with signals, their end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import psutil
from joblib import Parallel
from joblib.externals.loky import get_reusable_executor

_POLL_S = 0.5
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def _parallel(workers: int) -> Any:
    """Return a pool of `workers` processes that takes tasks as they come free and yields results in any order."""
    return Parallel(
        n_jobs=max(workers, 2),  # joblib runs a pool of one in this process
        backend="loky",
        return_as="generator_unordered",
        pre_dispatch=workers,
        batch_size=1,
        initializer=initialize_worker,
        initargs=(os.getpid(),),
    )


def start(calls: Iterable[Any], workers: int) -> Iterator[Any]:
    """Start the calls in a pool and return its results as they come.

    What is started here (workers, the threads that start more of them, loky's resource tracker) inherits blocked
    signals, so that a signal to the whole process group, as from a terminal or a batch system, is the parent's alone
    from the first moment on. In the parent it is delivered when this returns.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        results: Iterator[Any] = _parallel(workers)(calls)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return results


def initialize_worker(parent: int) -> None:
    """Leave signals to the parent (they reach the whole process group), and end with it.

    A worker whose parent was killed would otherwise finish what was handed to it, for tens of seconds.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def cpu_s() -> float:
    """Return the CPU seconds that this process and the living ones it has started have used."""
    mine = psutil.Process()
    total = 0.0
    for process in (mine, *mine.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def kill() -> None:
    """Kill every process that this one has started."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.Error:
            continue


def close() -> None:
    """End the worker processes and wait for them."""
    get_reusable_executor(max_workers=1, reuse=True).shutdown(wait=True, kill_workers=True)
