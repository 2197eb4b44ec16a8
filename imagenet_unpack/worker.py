"""`run_shard`: the only callable that travels to the workers. All news is in its return value."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from imagenet_unpack import staging
from imagenet_unpack.errors import FATAL_TARGET_ERRNOS, ArchiveError
from imagenet_unpack.extractor import SourceError, extract_shard
from imagenet_unpack.model import Outcome, Shard, ShardFailed

_POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What every shard of a run shares.

    Attributes:
        target: the target folder.
        part: name of the run's part, `0-of-1` for a whole run.
        token: a file that exists for as long as the run wants its shards.
        keep_mtime: give files the members' modification times.
    """

    target: str
    part: str
    token: str
    keep_mtime: bool = False


class _RunEndedError(Exception):
    """The run's token is gone: drop the shard."""


def run_shard(shard: Shard, settings: Settings) -> Outcome:
    """Extract one shard and return what became of it; never raises, whatever went wrong."""
    home = staging.SplitFolder(Path(settings.target), shard.split)
    last_look = 0.0

    def before_window(_nbytes: int) -> None:
        nonlocal last_look
        now = time.monotonic()
        if now - last_look >= _POLL_S:
            last_look = now
            if not _exists(settings.token):
                raise _RunEndedError

    def failed(kind: str, message: str, *, fatal: bool = False, number: int | None = None) -> ShardFailed:
        return ShardFailed(shard=shard.id, split=shard.split, kind=kind, message=message, fatal=fatal, errno=number)

    try:
        before_window(0)
        with _lease(home.lease(settings.part)):
            return extract_shard(
                shard, home.tree, home.part(shard.id), keep_mtime=settings.keep_mtime, before_window=before_window
            )
    except _RunEndedError:
        return failed("stopped", "dropped as the run was ending")
    except SourceError as error:
        return failed("source-io", str(error))
    except ArchiveError as error:
        return failed("archive", str(error))
    except OSError as error:
        if not _exists(settings.token):
            return failed("stopped", "dropped as the run was ending")
        where = f" ({error.filename})" if error.filename else ""
        return failed(
            "target-io",
            f"cannot write to {home.tree}: {error.strerror}{where}",
            fatal=error.errno in FATAL_TARGET_ERRNOS,
            number=error.errno,
        )
    except Exception as error:  # noqa: BLE001 - a defect: it must come back as a value, or it takes the whole pool down
        return ShardFailed(
            shard=shard.id, split=shard.split, kind="defect", message=repr(error), traceback=traceback.format_exc()
        )


@contextmanager
def _lease(path: Path) -> Iterator[None]:
    """Hold a shared lock while writing, so that a later run can wait for a dead run's last workers."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        staging.try_lock(fd, shared=True)
        yield
    finally:
        os.close(fd)


def _exists(path: str) -> bool:
    """Open it: on NFS a stat may be answered from a cache, an open asks the server."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except FileNotFoundError:
        return False
    except OSError:
        return True  # a failing target speaks for itself at the next write
    return True
