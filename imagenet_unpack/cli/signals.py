"""Signals while a command runs: a thread takes them and calls what the command has for them.

They are blocked in the main thread, and so in the processes that it starts: a signal to the whole process group is this
process's alone. A handler would run in the main thread, between two of Python's steps: never, where that thread is in a
call to a file system that hangs.

A command has one of two things for a signal: `interrupt` raises an exception in the main thread, and `taken_signals`
asks a run to end in order. Blocks may be nested: the inner one counts.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from imagenet_unpack.host.signals import SIGNALS
from imagenet_unpack.run.cancel import Cancel

Take = Callable[[int], None]

_WAKE = signal.SIGURG  # ends a call of the main thread that can be ended; ignored wherever it has no handler
_takers: list[Take] = []


class Interrupted(KeyboardInterrupt):
    """A signal ended a command that has nothing to be finished in order."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def interrupt(leave: Take, *, grace_s: float) -> Iterator[None]:
    """Let the first signal raise `Interrupted` in the main thread.

    Args:
        leave: ends the program, because of the signal of that number, from another thread: where the main thread has
            not left the block after the grace, or at once for a second Ctrl-C.
        grace_s: what the main thread has to clean up.
    """
    number: list[int] = []
    lock = threading.Lock()
    ended = threading.Event()

    def raise_it(_number: int, _frame: object) -> None:
        raise Interrupted(number[0])

    def leave_unless_ended(after_s: float) -> None:
        if not ended.wait(after_s):
            with lock:
                if not ended.is_set():
                    leave(number[0])

    def take(taken: int) -> None:
        first = not number
        number.append(taken)
        if first:
            _started(threading.Thread(target=leave_unless_ended, args=(grace_s,), name="leave", daemon=True))
            signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)
        elif taken == signal.SIGINT:
            leave_unless_ended(0)

    before = signal.signal(_WAKE, raise_it)
    try:
        with _taking(take):
            yield
    finally:
        with lock:  # while the other thread leaves, this one does not go on
            ended.set()
        signal.signal(_WAKE, before)


@contextmanager
def taken_signals(cancel: Cancel) -> Iterator[None]:
    """Turn signals into requests until the end of the block; a second Ctrl-C ends the program at once."""

    def take(number: int) -> None:
        if number == signal.SIGINT == cancel.signal:
            cancel.at_once()
        cancel.request(number)

    with _taking(take):
        yield


@contextmanager
def _taking(take: Take) -> Iterator[None]:
    """Have `SIGNALS` taken by `take`, in a thread, until the end of the block."""
    _takers.append(take)
    try:
        if len(_takers) > 1:
            yield
        else:
            with _listening():
                yield
    finally:
        _takers.pop()


@contextmanager
def _listening() -> Iterator[None]:
    closing = threading.Event()

    def hand_on(number: int, _frame: object = None) -> None:
        _takers[-1](number)

    def listen() -> None:
        while True:
            number = signal.sigwait(SIGNALS)
            if closing.is_set():
                return
            hand_on(number)

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    # For threads that do not block them: those of before, and this one while Python starts a helper process of its own.
    handlers = {number: signal.signal(number, hand_on) for number in SIGNALS}
    thread = threading.Thread(target=listen, name="signals", daemon=True)
    listening = _started(thread)
    if not listening:  # then the handlers alone take signals, as long as the main thread does not hang
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield
    finally:
        closing.set()
        if listening:
            signal.pthread_kill(thread.ident or 0, signal.SIGUSR2)
            thread.join()
            while signal.sigtimedwait(SIGNALS, 0) is not None:  # came too late to change anything
                pass
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _started(thread: threading.Thread) -> bool:
    """Start a thread; return False where a limit of the host does not let it."""
    try:
        thread.start()
    except RuntimeError:
        return False
    return True
