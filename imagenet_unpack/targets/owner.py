"""Owner files: a second run on another host is seen even where both mounts grant the same lock.

A run that writes has an owner file with a random nonce and a counter that goes up every few seconds. Whoever finds one
that is not its own watches it: a counter that moves belongs to a run at work, one that stands still to a dead one. Only
contents are compared, no clocks. A run whose owner file holds another nonce has lost its target and journals nothing
more.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from imagenet_unpack.errors import StoppedError
from imagenet_unpack.targets.durable import Disk, read_file
from imagenet_unpack.targets.locks import InUseError, Pause
from imagenet_unpack.targets.records import boot_id

BEAT_S = 4.0
WATCH_S = 15.0
_POLL_S = 0.5
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mark:
    """What an owner file says of its run."""

    nonce: str
    host: str
    pid: int
    boot: str
    pid_space: str
    started: str

    @classmethod
    def of_this_process(cls) -> _Mark:
        return cls(
            nonce=secrets.token_hex(16),
            host=socket.gethostname(),
            pid=os.getpid(),
            boot=boot_id(),
            pid_space=_pid_space(),
            started=_process(os.getpid())[0],
        )

    @classmethod
    def read(cls, data: bytes) -> _Mark | None:
        """Read an owner file; None where it is not (yet) whole."""
        try:
            value = json.loads(data)
            return cls(
                nonce=str(value["nonce"]),
                host=str(value["host"]),
                pid=int(value["pid"]),
                boot=str(value["boot"]),
                pid_space=str(value["pid_space"]),
                started=str(value["started"]),
            )
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def to_bytes(self, beat: int) -> bytes:
        members = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps(members | {"beat": beat}).encode() + b"\n"

    def surely_dead(self) -> bool:
        """Whether it was a process of this very host that has ended; False where that is unknown."""
        if not self.boot or (self.boot, self.pid_space) != (boot_id(), _pid_space()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        started, running = _process(self.pid)
        return bool(started) and (not running or (bool(self.started) and started != self.started))


class Owner:
    """This run's owner file; beats from a thread of its own until it is closed."""

    def __init__(self, path: Path, disk: Disk, *, beat_s: float = BEAT_S) -> None:
        self._path = path
        self._disk = disk
        self._mark = _Mark.of_this_process()
        self._beat_s = beat_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beats, name=f"owner-{path.name}", daemon=True)
        self._disk.write_file(path, self._mark.to_bytes(0), sync=False)  # it has to be seen, not to last
        self._thread.start()

    def require(self) -> None:
        """Make sure that the target is still this run's.

        Raises:
            StoppedError: another run has taken it over.
        """
        data = read_file(self._path)
        mark = None if data is None else _Mark.read(data)
        if data is None or (mark is not None and mark.nonce != self._mark.nonce):
            other = f" by process {mark.pid} on {mark.host}" if mark is not None else ""
            raise StoppedError(
                f"the target was taken over{other} ({self._path} is no longer this run's): only one run may use it"
            )

    def close(self) -> None:
        """End the beats and remove the file if it is still this run's; never raises."""
        self._ended.set()
        # A thread that hangs in a dead network file system is left behind; it is a daemon.
        self._thread.join(timeout=1.0)
        with suppress(OSError, StoppedError):
            self.require()
            self._path.unlink()

    def _beats(self) -> None:
        beat = 0
        while not self._ended.wait(self._beat_s):
            beat += 1
            with suppress(OSError, StoppedError):  # who writes next meets the fault, and says it
                self.require()
                fd = os.open(self._path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    os.pwrite(fd, self._mark.to_bytes(beat), 0)
                finally:
                    os.close(fd)


def wait_for_owners(
    paths: Iterable[Path],
    what: str,
    *,
    pause: Pause = time.sleep,
    watch_s: float = WATCH_S,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Make sure that no other run writes, whatever the locks said; remove what dead ones left.

    Args:
        paths: owner files that there may be.
        what: what they own, for messages.
        pause: waits between looks; may raise to end the waiting.
        watch_s: a counter that does not change for this long belongs to a dead run.
        clock: seconds, for tests.

    Raises:
        InUseError: another run is at work.
    """
    for path in paths:
        before = read_file(path)
        if before is None:
            continue
        mark = _Mark.read(before)
        if mark is None or not mark.surely_dead():
            who = f"process {mark.pid} on {mark.host}" if mark is not None else "another run"
            log.warning("%s was last used by %s, which did not end in order: checking that it is gone", what, who)
            until_s = clock() + watch_s
            while clock() < until_s and not (mark is not None and mark.surely_dead()):
                pause(_POLL_S)
                now = read_file(path)
                if now is None:
                    break
                if now != before:
                    raise InUseError(f"{what} is in use by {who}: wait for it or stop it")
        with suppress(FileNotFoundError):
            path.unlink()


def _pid_space() -> str:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _process(pid: int) -> tuple[str, bool]:
    """Return when a process began, in the kernel's ticks ("" if it is hidden), and whether it is more than a zombie.

    Format: fields 22 and 3 of proc_pid_stat(5).
    """
    with suppress(OSError, IndexError):
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = text.rpartition(")")[2].split()
        return fields[19], fields[0] not in "ZX"
    return "", True
