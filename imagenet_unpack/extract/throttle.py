"""Gates and rates: whether work may go on, from samples of the host, and how fast, over all workers of a host.

Both run in the workers, beside the I/O. A gate only waits; the caller shows the reason.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from imagenet_unpack.errors import HostError, reason
from imagenet_unpack.host import resources
from imagenet_unpack.sources.reader import WINDOW_BYTES
from imagenet_unpack.text import human_bytes, human_time

GATE_LOOK_S = 0.25
WAIT_LOOK_S = 0.5
_BURST_S = 0.1
_QUANTUM_S = 0.01
_WINDOW_S = 0.125
_LEAST_WINDOW_BYTES = 64 << 10
DEFAULT = -1  # of a threshold: what `with_defaults` makes of it
DEFAULT_FREE_SPACE = 1 << 30
DEFAULT_FREE_MEMORY = 512 << 20
DEFAULT_STALL_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the workers of a run keep to; 0 is: no limit.

    Attributes:
        free_space: bytes to be left free on the target's file system; or `DEFAULT`.
        free_memory: bytes of memory to be left to this job; or `DEFAULT`.
        read_rate: bytes/s read from archives, over all workers of a host.
        write_rate: bytes/s written to images, likewise.
        create_rate: images created a second, likewise.
        rate_dir: the folder of the file that all who share the rates have in common, or "" for the host's own.
        stall_timeout_s: how long a worker waits at its gate before the run ends.
    """

    free_space: int = 0
    free_memory: int = 0
    read_rate: float = 0.0
    write_rate: float = 0.0
    create_rate: float = 0.0
    rate_dir: str = ""
    stall_timeout_s: float = DEFAULT_STALL_S

    @property
    def window_bytes(self) -> int:
        """Largest piece to be read or written at once, so that no burst is long; a multiple of 512."""
        rates = [rate for rate in (self.read_rate, self.write_rate) if rate]
        return max(_LEAST_WINDOW_BYTES, int(min(rates) * _WINDOW_S) // 512 * 512) if rates else WINDOW_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What was free at one moment, in bytes."""

    free_space: int
    free_memory: int


def decide(limits: Limits, sample: Sample) -> str | None:
    """Say what work has to wait for, or None when it may go on."""
    if sample.free_space < limits.free_space:
        free, kept = human_bytes(sample.free_space), human_bytes(limits.free_space)
        return f"free space on the target: {free} left, but --min-free-space keeps {kept}"
    if sample.free_memory < limits.free_memory:
        free, kept = human_bytes(sample.free_memory), human_bytes(limits.free_memory)
        return f"free memory: {free} left, but --min-free-memory keeps {kept}"
    return None


def default_free_space(total: int, free: int, needed: int) -> int:
    """Return the default threshold of free space for a file system of `total` bytes.

    A small file system, or one that the job will nearly fill, is not to be waited for in vain.
    """
    return max(0, min(DEFAULT_FREE_SPACE, total // 20, (free - needed) // 2))


def default_free_memory(total: int) -> int:
    """Return the default threshold of free memory for a job that may use `total` bytes."""
    return min(DEFAULT_FREE_MEMORY, total // 10)


def with_defaults(limits: Limits, room: resources.Room, memory: resources.Memory) -> Limits:
    """Put the default thresholds where none is named (`DEFAULT`)."""
    free_space, free_memory = limits.free_space, limits.free_memory
    if free_space == DEFAULT:
        free_space = default_free_space(room.bytes_total, room.bytes_free, room.bytes_needed)
    if free_memory == DEFAULT:
        free_memory = default_free_memory(memory.total)
    return replace(limits, free_space=free_space, free_memory=free_memory)


class StalledError(Exception):
    """A gate stayed closed for longer than the stall timeout."""


class Gate:
    """Lets work go on while there is room; looks at most every `GATE_LOOK_S`, as it is asked before every window.

    Args:
        limits: the thresholds.
        sample: looks at the host.
        relieve: called while memory is short: may bring dirty pages to the disk.
        shown: called at each look with the reason for waiting, with None when it is over; may raise to end the wait.
    """

    def __init__(
        self,
        limits: Limits,
        sample: Callable[[], Sample],
        *,
        relieve: Callable[[], None] = lambda: None,
        shown: Callable[[str | None], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._limits = limits
        self._sample = sample
        self._relieve = relieve
        self._shown = shown
        self._clock = clock
        self._sleep = sleep
        self._looked_s = float("-inf")

    def wait(self) -> None:
        """Return when there is room.

        Raises:
            StalledError: there was none for the whole of the stall timeout.
        """
        began_s = self._clock()
        if began_s - self._looked_s < GATE_LOOK_S or not (self._limits.free_space or self._limits.free_memory):
            return
        waited = False
        while True:
            sample = self._sample()
            reason = decide(self._limits, sample)
            self._looked_s = self._clock()
            if reason is None:
                break
            waited = True
            self._shown(reason)
            waited_s = self._looked_s - began_s
            if waited_s >= self._limits.stall_timeout_s:
                raise StalledError(f"waited {human_time(waited_s)} for {reason}")
            if sample.free_memory < self._limits.free_memory:
                self._relieve()
            self._sleep(min(WAIT_LOOK_S, max(0.0, self._limits.stall_timeout_s - waited_s)))
        if waited:
            self._shown(None)


class RateLimiter:
    """One rate shared by every process of this user on this host: a token bucket in a small file.

    The file holds, for each kind, the time at which all that was taken so far is paid for (the generic cell rate
    algorithm, ITU-T I.371). A taker moves it on under a lock and then sleeps until its own share is paid for, so
    shares come in turn. The kernel frees the lock of a process that dies; what such a process had taken and not used is
    at most a window, or a hundredth of a second's worth.

    Args:
        kind: which of the rates; `KINDS`.
        rate: units a second.
        folder: where the file lies; any local, writable folder that all share. Default: /dev/shm, else the folder for
            temporary files.
        spare: names a file of this run's own for where the shared one cannot be used (another user's, no room).

    Raises:
        HostError: there is no place for the file.
    """

    KINDS = ("read", "write", "create")

    def __init__(
        self,
        kind: str,
        rate: float,
        *,
        folder: Path | None = None,
        spare: str = "",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._offset = self.KINDS.index(kind) * 8
        self._rate = rate
        self._sleep = sleep
        self._credit = 0.0
        self._fd = _open_rate_file(resources.local_folders() if folder is None else [folder], spare)

    def close(self) -> None:
        """Give the file back."""
        os.close(self._fd)

    def take(self, amount: float) -> None:
        """Return when `amount` units are paid for; takes a little ahead, so that small amounts share one lock."""
        if amount > self._credit:
            share = max(amount - self._credit, self._rate * _QUANTUM_S)
            self._credit += share
            self._wait_until(self._reserve(share))
        self._credit -= amount

    def _reserve(self, share: float) -> float:
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            now_s = time.monotonic()  # the same for all processes of a host, from its boot on
            stored = os.pread(self._fd, 8, self._offset)
            paid_s = struct.unpack("<d", stored)[0] if len(stored) == 8 else 0.0
            if paid_s > now_s + 600:  # of an earlier boot, where the file outlived it
                paid_s = 0.0
            due_s: float = max(paid_s, now_s - _BURST_S) + share / self._rate
            os.pwrite(self._fd, struct.pack("<d", due_s), self._offset)
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        return due_s

    def _wait_until(self, due_s: float) -> None:
        while (left_s := due_s - time.monotonic()) > 0:
            self._sleep(min(left_s, WAIT_LOOK_S))


def _open_rate_file(folders: Iterable[Path], spare: str) -> int:
    """Open the first file that is this user's own and has room for the times.

    In user namespaces (fakeroot, rootless containers) that share /dev/shm, every user has the same number.
    """
    faults = []
    names = [str(os.getuid()), spare] if spare else [str(os.getuid())]
    for name, folder in itertools.product(names, folders):
        path = folder / f"imagenet_unpack-{name}.rates"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            faults.append(f"{path}: {reason(error)}")
            continue
        try:
            if os.fstat(fd).st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "it belongs to another user")
            os.posix_fallocate(fd, 0, 8 * len(RateLimiter.KINDS))
        except OSError as error:
            os.close(fd)
            faults.append(f"{path}: {reason(error)}")
            continue
        return fd
    raise HostError(f"rate limits need a small file that this host's processes share: {'; '.join(faults)}")
