"""Cancellation of a run: one object that is passed on and asked.

    running --request()--> stopping --grace--> killing --grace--> leaving

`request` only sets a flag and starts a thread, so nothing in it can wait for a target that hangs. That thread tells the
workers to stop; after a grace it kills those that have not; and where the run's own thread does not end either, because
a call to the target does not return, it leaves the program in its place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from imagenet_unpack.errors import CancelledError, ExitCode

KILL_AFTER_S = 6.0
LEAVE_AFTER_S = 9.0


def _nothing() -> None:
    pass


class Cancel:
    """Whether a run is to end, and why.

    Attributes:
        signal: number of the signal that asked for it, or None.

    Args:
        leave: ends the program at once with an exit code, from another thread than the run's, and says why in the
            second argument. None: the program is not ours to end.
        kill_after_s: after a request, how long workers have to end by themselves.
        leave_after_s: after a request, how long the run's own thread has.
    """

    def __init__(
        self,
        leave: Callable[[int, str], None] | None = None,
        *,
        kill_after_s: float = KILL_AFTER_S,
        leave_after_s: float = LEAVE_AFTER_S,
    ) -> None:
        self.signal: int | None = None
        self._leave = leave
        self._kill_after_s = kill_after_s
        self._leave_after_s = leave_after_s
        self._requested = threading.Event()
        self._ended = threading.Event()
        self._stop: Callable[[], None] = _nothing
        self._kill: Callable[[], None] = _nothing

    @property
    def requested(self) -> bool:
        """Whether the run is to end."""
        return self._requested.is_set()

    @property
    def exit_code(self) -> int:
        """What a run that was ended this way exits with."""
        return ExitCode.STOPPED if self.signal is None else 128 + self.signal

    def check(self) -> None:
        """Raise where nothing is going on that has to be ended in order.

        Raises:
            CancelledError: the run is to end.
        """
        if self.requested:
            raise CancelledError

    def wait(self, seconds: float) -> bool:
        """Sleep, but not beyond a request; return whether there is one."""
        return self._requested.wait(seconds)

    def request(self, number: int | None = None) -> None:
        """Ask the run to end, because of the signal `number` or (None) because it cannot go on; never blocks."""
        if self.signal is None:
            self.signal = number
        if not self.requested:
            self._requested.set()
            _start(self._enforce)

    def at_once(self) -> None:
        """Kill the workers and leave: a second Ctrl-C."""
        self._kill()
        if self._leave is not None:
            self._leave(self.exit_code, "stopped at once; run the same command again to continue")

    @contextmanager
    def workers(self, *, stop: Callable[[], None], kill: Callable[[], None]) -> Iterator[None]:
        """Within the block a request also ends workers: `stop` asks them to (and may block), `kill` kills them."""
        self._stop, self._kill = stop, kill
        if self.requested:
            _start(stop)
        try:
            yield
        finally:
            self._stop = self._kill = _nothing

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The run's whole life: when the block ends, nothing has to be enforced any longer."""
        try:
            yield
        finally:
            self._ended.set()

    def _enforce(self) -> None:
        _start(self._stop)
        if self._ended.wait(self._kill_after_s):
            return
        self._kill()
        if self._ended.wait(self._leave_after_s - self._kill_after_s) or self._leave is None:
            return
        self._leave(
            self.exit_code,
            f"could not end in order in {self._leave_after_s:.0f} s (a file system or a scheduler does not answer): "
            "stopped without it; run the same command again to continue",
        )


def _start(task: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # no thread can be started: then workers end with their shards
        threading.Thread(target=_quietly, args=(task,), name="cancel", daemon=True).start()


def _quietly(task: Callable[[], None]) -> None:
    with suppress(OSError):
        task()
