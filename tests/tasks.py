"""Calls for worker processes; imports nothing, so that a worker shows what it imports by itself."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys


def double(number: int) -> int:
    return 2 * number


def die(_: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def die_in_worker(number: int) -> int:
    return die(number) if multiprocessing.parent_process() is not None else double(number)


def seen_in_worker(_: int) -> tuple[set[str], set[int], bool]:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    return set(sys.modules), set(blocked), signal.getsignal(signal.SIGINT) == signal.SIG_IGN
