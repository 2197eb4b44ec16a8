"""`run_shard`: the only callable that travels to the workers. Everything it reports is in its return value."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from imagenet_unpack.errors import (
    FATAL_SOURCE_ERRNOS,
    FATAL_TARGET_ERRNOS,
    ArchiveError,
    HostError,
    host_fault,
    reason,
)
from imagenet_unpack.extract.extractor import extract_shard
from imagenet_unpack.extract.folders import FolderSink
from imagenet_unpack.extract.throttle import Gate, Limits, RateLimiter, Sample, StalledError
from imagenet_unpack.host import resources
from imagenet_unpack.host.status import Progress, StatusFile
from imagenet_unpack.model import Outcome, Shard, ShardDone, ShardFailed
from imagenet_unpack.sources.reader import WINDOW_BYTES, SourceError
from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.targets.locks import lease
from imagenet_unpack.targets.paths import SplitPaths
from imagenet_unpack.targets.runfile import says_stop

_POLL_S = 0.5
_FIRST_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What every shard of a run shares.

    Attributes:
        target: the target folder.
        part: name of the run's part, `0-of-1` for a whole run.
        run_file: the file that says whether the run is to end (`targets.runfile`).
        status: how workers on the run's host open its status file, or "".
        limits: the thresholds and rates to keep to.
        window_bytes: how much to read at once, at most; a multiple of 512.
        keep_mtime: give files the members' modification times.
        uncached_writes: leave no page cache behind what is written, where the kernel can.
        sync_each_file: the target's file system brings nothing to the disk but what is synced by itself.
    """

    target: str
    part: str
    run_file: str
    status: str = ""
    limits: Limits = Limits()
    window_bytes: int = WINDOW_BYTES
    keep_mtime: bool = False
    uncached_writes: bool = False
    sync_each_file: bool = False


class _StoppedError(Exception):
    """The run is to end: drop the shard."""


def run_shard(shard: Shard, settings: Settings) -> Outcome:
    """Extract one shard and return what became of it; never raises, whatever went wrong."""
    paths = SplitPaths(Path(settings.target), shard.split)
    disk = Disk(sync_each_file=settings.sync_each_file)

    def task(stack: ExitStack) -> ShardDone:
        pace = ShardPace(shard, settings, paths.root, stack)
        pace.window(0)
        stack.enter_context(lease(paths.lease(settings.part)))
        sink = FolderSink(
            paths.tree,
            pace,
            keep_mtime=settings.keep_mtime,
            uncached_writes=settings.uncached_writes,
            disk=disk,
        )
        return extract_shard(shard, sink, paths.fragment(shard.id), pace=pace, disk=disk)

    return guarded(shard, settings, paths.tree, task)


def guarded(shard: Shard, settings: Settings, where: Path, task: Callable[[ExitStack], ShardDone]) -> Outcome:
    """Run the task of one shard and return what became of it; never raises, whatever went wrong.

    Which thing failed (archive, target, host, program) is decided here, once, from the exception that was raised.

    Args:
        shard: the shard.
        settings: of its run.
        where: what the task writes to, for messages.
        task: does the work; what it enters on the stack is closed when it ends.
    """

    def failed(kind: str, message: str, *, fatal: bool = False, number: int | None = None) -> ShardFailed:
        return ShardFailed(shard=shard.id, split=shard.split, kind=kind, message=message, fatal=fatal, errno=number)

    try:
        with ExitStack() as stack:
            return task(stack)
    except _StoppedError:
        return failed("stopped", "dropped as the run was ending")
    except StalledError as error:
        return failed("stalled", str(error), fatal=True)
    except HostError as error:
        return failed("host", str(error), fatal=True)
    except SourceError as error:
        return _source_failure(shard, error, failed)
    except ArchiveError as error:
        return failed("archive", str(error))
    except (OSError, MemoryError) as error:
        if says_stop(settings.run_file):
            return failed("stopped", "dropped as the run was ending")
        host = host_fault(error)
        if host is not None:
            return failed("host", str(host), fatal=True)
        named = getattr(error, "filename", None)
        number = getattr(error, "errno", None)
        message = f"cannot write to {where}: {reason(error)}{f' ({named})' if named else ''}"
        return failed("target-io", message, fatal=number in FATAL_TARGET_ERRNOS, number=number)
    except Exception as error:  # noqa: BLE001 - a defect: it must come back as a value, or it takes the whole pool down
        host = host_fault(error)  # no more threads
        if host is not None:
            return failed("host", str(host), fatal=True)
        return ShardFailed(
            shard=shard.id, split=shard.split, kind="defect", message=repr(error), traceback=traceback.format_exc()
        )


def _source_failure(shard: Shard, error: SourceError, failed: Callable[..., ShardFailed]) -> ShardFailed:
    """Tell a bad place in an archive, which fails its shard, from an archive that no shard can read any longer."""
    cause = error.__cause__
    if not isinstance(cause, OSError):
        return failed("source-io", str(error))
    host = host_fault(cause)
    if host is not None:
        return failed("host", str(host), fatal=True)
    gone = cause.errno in FATAL_SOURCE_ERRNOS or not _can_be_read(shard.archive.path)
    return failed("source-io", str(error), fatal=gone, number=cause.errno)


def _can_be_read(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        os.posix_fadvise(fd, 0, _FIRST_BYTES, os.POSIX_FADV_DONTNEED)  # ask the device, not the page cache
        return bool(os.pread(fd, _FIRST_BYTES, 0))
    except OSError:
        return False
    finally:
        os.close(fd)


class ShardPace:
    """Cancellation, resource gate, rate limits and progress for one shard."""

    def __init__(self, shard: Shard, settings: Settings, folder: Path, stack: ExitStack) -> None:
        self._slot = shard.slot
        self._run_file = settings.run_file
        self._looked_s = 0.0
        self._size_bytes = 0
        self._images = 0
        self._status = StatusFile.open(settings.status)
        stack.callback(self._status.close)
        limits = settings.limits
        self.window_bytes = min(settings.window_bytes, limits.window_bytes)
        self._gate = Gate(
            limits,
            lambda: Sample(free_space=resources.free_bytes(folder), free_memory=resources.memory().available),
            relieve=lambda: Disk().sync_all(folder),
            shown=self._shown,
        )

        def limiter(kind: str, rate: float) -> RateLimiter | None:
            if not rate:
                return None
            folder = Path(limits.rate_dir) if limits.rate_dir else None
            made = RateLimiter(kind, rate, folder=folder, spare=Path(settings.run_file).name, sleep=self._sleep)
            stack.callback(made.close)
            return made

        self._reads = limiter("read", limits.read_rate)
        self._writes = limiter("write", limits.write_rate)
        self._creates = limiter("create", limits.create_rate)

    def window(self, nbytes: int) -> None:
        """Before a window is read."""
        self._look()
        self._gate.wait()
        if self._reads is not None:
            self._reads.take(nbytes)
        self._shown(None)
        self._size_bytes += nbytes

    def create(self) -> None:
        """Before an image is created."""
        self._images += 1
        if self._creates is not None:
            self._creates.take(1)

    def write(self, nbytes: int) -> None:
        """Before bytes are written."""
        if self._writes is not None:
            self._writes.take(nbytes)

    def _sleep(self, seconds: float) -> None:
        time.sleep(seconds)
        self._look()

    def _shown(self, waiting: str | None) -> None:
        progress = Progress(size_bytes=self._size_bytes, images=self._images, waiting=waiting or "")
        self._status.write(self._slot, progress)
        self._look()

    def _look(self) -> None:
        now_s = time.monotonic()
        if now_s - self._looked_s >= _POLL_S:
            self._looked_s = now_s
            if says_stop(self._run_file):
                raise _StoppedError
