"""`run_shard`: the only callable that travels to the workers. All news is in its return value."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from imagenet_unpack.errors import FATAL_TARGET_ERRNOS, ArchiveError
from imagenet_unpack.extract.extractor import extract_shard
from imagenet_unpack.extract.folders import FolderSink
from imagenet_unpack.extract.throttle import Gate, Limits, RateLimiter, Sample, StalledError
from imagenet_unpack.host import resources
from imagenet_unpack.host.status import Board, Word
from imagenet_unpack.model import Outcome, Shard, ShardDone, ShardFailed
from imagenet_unpack.sources.reader import WINDOW_BYTES, SourceError
from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.targets.locks import lease
from imagenet_unpack.targets.paths import SplitPaths

_POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What every shard of a run shares.

    Attributes:
        target: the target folder.
        part: name of the run's part, `0-of-1` for a whole run.
        token: a file that exists for as long as the run wants its shards.
        board: where workers on the runner's host leave word, or "".
        limits: the marks and rates to keep to.
        window_bytes: how much to read at once, at most; a multiple of 512.
        keep_mtime: give files the members' modification times.
        uncached_writes: leave no page cache behind what is written, where the kernel can.
        sync_each_file: the target's file system brings nothing to the disk but what is synced by itself.
    """

    target: str
    part: str
    token: str
    board: str = ""
    limits: Limits = Limits()
    window_bytes: int = WINDOW_BYTES
    keep_mtime: bool = False
    uncached_writes: bool = False
    sync_each_file: bool = False


class _RunEndedError(Exception):
    """The run's token is gone: drop the shard."""


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
    except _RunEndedError:
        return failed("stopped", "dropped as the run was ending")
    except StalledError as error:
        return failed("stalled", str(error), fatal=True)
    except SourceError as error:
        return failed("source-io", str(error))
    except ArchiveError as error:
        return failed("archive", str(error))
    except OSError as error:
        if not _exists(settings.token):
            return failed("stopped", "dropped as the run was ending")
        named = f" ({error.filename})" if error.filename else ""
        return failed(
            "target-io",
            f"cannot write to {where}: {error.strerror}{named}",
            fatal=error.errno in FATAL_TARGET_ERRNOS,
            number=error.errno,
        )
    except Exception as error:  # noqa: BLE001 - a defect: it must come back as a value, or it takes the whole pool down
        return ShardFailed(
            shard=shard.id, split=shard.split, kind="defect", message=repr(error), traceback=traceback.format_exc()
        )


class ShardPace:
    """What a worker minds beside the I/O: does the run go on, is there room, how fast may it be; and leaves word."""

    def __init__(self, shard: Shard, settings: Settings, folder: Path, stack: ExitStack) -> None:
        self._shard = f"{shard.split}/{shard.id}"
        self._token = settings.token
        self._looked_s = 0.0
        self._size_bytes = 0
        self._images = 0
        self._board = Board(settings.board)
        stack.callback(self._board.close)
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
            made = RateLimiter(kind, rate, sleep=self._sleep)
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

    def _shown(self, reason: str | None) -> None:
        self._board.write(self._shard, Word(size_bytes=self._size_bytes, images=self._images, waiting=reason or ""))
        self._look()

    def _look(self) -> None:
        now_s = time.monotonic()
        if now_s - self._looked_s >= _POLL_S:
            self._looked_s = now_s
            if not _exists(self._token):
                raise _RunEndedError


def _exists(path: str) -> bool:
    """Open it: on NFS a stat may be answered from a cache, an open asks the server."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except FileNotFoundError:
        return False
    except OSError:
        return True  # a failing target speaks for itself at the next write
    return True
