"""The file by which a run tells its workers, on any host, to stop.

TARGET/.imagenet_unpack/run-<nonce> holds one word, which is overwritten in place: that needs no room on a full disk,
and a client of a network file system that opens the file again is told of it, while one that looks for a file that was
not there may be answered from its cache for a minute. The file's absence means nothing: purges of scratch space remove
files, and a run whose file is gone goes on. Its name is a random number, as containers may share host name and process
ids.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from pathlib import Path

from imagenet_unpack.targets.paths import STATE_FOLDER

_PREFIX = "run-"
_RUNNING, _STOP = b"running\n", b"stop   \n"
_STALE_S = 24 * 3600


class RunFile:
    """The run's side of it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, target: Path) -> RunFile:
        """Create the file of a run on a target; see `create_in`."""
        return cls.create_in(target / STATE_FOLDER)

    @classmethod
    def create_in(cls, folder: Path) -> RunFile:
        """Create the file of a new run, and remove those that dead runs left behind a day ago or earlier.

        Raises:
            OSError: the folder cannot be written.
        """
        for path in folder.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_S:
                    path.unlink()
        made = cls(folder / f"{_PREFIX}{secrets.token_hex(8)}")
        made._write(_RUNNING)
        return made

    def stop(self) -> None:
        """Tell the workers to drop their shards; may block or fail where the target does.

        Raises:
            OSError: it cannot be written.
        """
        self._write(_STOP)

    def remove(self) -> None:
        """Remove the file, if that is possible: to be called when no worker is left that has to read it."""
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _write(self, word: bytes) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            os.write(fd, word)
        finally:
            os.close(fd)


def says_stop(path: str) -> bool:
    """Tell whether the run whose file is `path` wants its workers to stop; a file that cannot be read says nothing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False  # gone by accident, or on a failing target, which the next write will report
    try:
        return os.read(fd, len(_STOP)) == _STOP
    except OSError:
        return False
    finally:
        os.close(fd)
