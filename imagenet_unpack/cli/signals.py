"""Signal handling while a command runs."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

from imagenet_unpack.host.signals import SIGNALS


class Interrupted(KeyboardInterrupt):
    """A signal ended a command that has nothing to be finished in order."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _handled(handle: Callable[[int, object], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def interrupt() -> Iterator[None]:
    """Let a signal raise `Interrupted` at once, one that was blocked until now too."""

    def handle(number: int, _frame: object) -> None:
        raise Interrupted(number)

    with _handled(handle):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
