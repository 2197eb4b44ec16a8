"""Locks on archives: a run that reads one shares it, what changes one needs it alone."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from imagenet_unpack.errors import TargetError

_MOST_FILES = 16


@contextmanager
def shared(paths: Iterable[str]) -> Iterator[None]:
    """Let nobody change these archives until the end of the block, as far as the file system has locks.

    Of a source of many files, only the first few are locked: descriptors are limited, and what is changed in place is
    one large archive.
    """
    with ExitStack() as stack:
        for path in list(paths)[:_MOST_FILES]:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError:
                continue  # whoever reads it says so
            stack.callback(os.close, fd)
            if not _flock(fd, fcntl.LOCK_SH):
                raise TargetError(f"{path}: is being converted to an image or restored: wait until that has ended")
        yield


@contextmanager
def all_exclusive(paths: Iterable[str]) -> Iterator[None]:
    """Let no other run read these archives until the end of the block.

    Of a source of many files, the first few are locked, as by whoever reads it; the others must not be open now.

    Raises:
        TargetError: another run, or another process of this host, has one open.
    """
    with ExitStack() as stack:
        for number, path in enumerate(paths):
            with ExitStack() as one:
                one.enter_context(exclusive(Path(path)))
                if number < _MOST_FILES:
                    stack.push(one.pop_all())
        yield


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Let no other run read an archive until the end of the block.

    Raises:
        TargetError: another run, or another process of this host, has it open.
    """
    busy = TargetError(f"{path}: is in use by another run or program: wait until that has ended, then try again")
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if not _flock(fd, fcntl.LOCK_EX):
            raise busy
        try:
            # Linux grants a write lease only where no other descriptor of the file is open (fcntl(2)).
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except BlockingIOError:
            raise busy from None
        except OSError:
            pass  # a file system without leases, or a file of somebody else's
        yield
    finally:
        os.close(fd)


def _flock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True
