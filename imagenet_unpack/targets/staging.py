"""The staging tree, its locks, syncing and publishing.

TARGET/.imagenet_unpack/
    record.json              says that the folder is this program's
    locks/<split>.lock       held by the run (shared by its parts); names its host and process
    locks/<split>.<part>.lock    held by one part of several
    locks/<split>.opening.lock   held for a moment by whoever finds or makes the staging tree
    locks/<split>.<part>.lease   held, shared, by the workers of a part while they write
    <split>/plan.json        what the unfinished run was planned from
    <split>/tree/<class>/    the files
    <split>/parts/<shard>.tsv    manifest rows of a shard, written last
    <split>/<part>.journal   shards known to be on the disk
    <split>/publish.json     all is on the disk and checked: renaming has begun
    <split>.json             record of a published split
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from imagenet_unpack.errors import TargetError
from imagenet_unpack.model import SplitName
from imagenet_unpack.targets.manifest import manifest_name

FOLDER = ".imagenet_unpack"
_RECORD = "record.json"
_PROGRAM = {"program": "imagenet_unpack", "schema": 1}
_LEASE_WAIT_S = 20.0
_LOCK_POLL_S = 0.05
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
log = logging.getLogger(__name__)


class SplitFolder:
    """Where everything of one split stands below a target."""

    def __init__(self, target: Path, split: SplitName) -> None:
        self.target = target
        self.split = split
        self.root = target / FOLDER
        self.home = self.root / split
        self.tree = self.home / "tree"
        self.parts = self.home / "parts"
        self.plan = self.home / "plan.json"
        self.intent = self.home / "publish.json"
        self.new_manifest = self.home / manifest_name(split)
        self.record = self.root / f"{split}.json"
        self.lock = self.root / "locks" / f"{split}.lock"
        self.published = target / split
        self.manifest = target / manifest_name(split)

    def part(self, shard: str) -> Path:
        """Manifest part of a shard."""
        return self.parts / f"{shard}.tsv"

    @property
    def opening(self) -> Path:
        """Lock file of whoever finds or makes the staging tree."""
        return self.root / "locks" / f"{self.split}.opening.lock"

    def part_lock(self, part: str) -> Path:
        """Lock file of one part of several."""
        return self.root / "locks" / f"{self.split}.{part}.lock"

    def lease(self, part: str) -> Path:
        """Lock file that the workers of a part hold while they write."""
        return self.root / "locks" / f"{self.split}.{part}.lease"

    def leases(self, part: str | None) -> list[Path]:
        """Lock files that the workers of a part, or of any part, hold while they write."""
        return [self.lease(part)] if part is not None else sorted((self.root / "locks").glob(f"{self.split}.*.lease"))


def claim_target(target: Path) -> None:
    """Make the target and its staging folder, or recognise them as this program's.

    Raises:
        TargetError: it is not a folder, cannot be written, or holds a `.imagenet_unpack` of something else.
    """
    root = target / FOLDER
    try:
        target.mkdir(parents=True, exist_ok=True)
        if not root.is_symlink() and root.is_dir():
            if _is_ours(root):
                return
            # Parts that start at once make it together.
            if any(not entry.name.startswith((_RECORD, "locks")) for entry in root.iterdir()):
                raise TargetError(
                    f"{root} is not a folder of this program: choose another --target-dir or move it away"
                )
        else:
            root.mkdir(exist_ok=True)
        (root / "locks").mkdir(exist_ok=True)
        write_json(root / _RECORD, _PROGRAM)
    except FileExistsError as error:
        raise TargetError(f"{error.filename} is in the way: it is not a folder") from error
    except OSError as error:
        raise TargetError(f"{target}: cannot be used as the target: {error.strerror} ({error.filename})") from error


def _is_ours(root: Path) -> bool:
    record = read_json(root / _RECORD)
    return record is not None and record.get("program") == _PROGRAM["program"]


@contextmanager
def lock(path: Path, what: str, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock file `path` for a run, or say who holds it; parts of one run share the split's.

    A lock ends with its process, so one that a dead run left behind does not stand in the way.

    Raises:
        TargetError: another run holds it.
    """
    with _lock_file(path) as fd:
        if not try_lock(fd, shared=shared):
            holder = os.pread(fd, 200, 0).decode("utf-8", "replace").strip() or "another process"
            raise TargetError(f"{what} is being worked on by {holder}: wait for it or stop it")
        me = f"process {os.getpid()} on {socket.gethostname()}{', a part of several' if shared else ''}\n"
        os.ftruncate(fd, 0)
        os.pwrite(fd, me.encode(), 0)
        yield


@contextmanager
def _lock_file(path: Path) -> Iterator[int]:
    """Give a descriptor to lock; the lock ends with it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def try_lock(fd: int, *, shared: bool = False, quiet: bool = False) -> bool:
    """Take a flock without waiting; on file systems that have none, warn (unless `quiet`) and go on."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if not quiet:
            log.warning("the target's file system has no locks: see to it that only one run at a time works on it")
    return True


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Hold a lock file for a moment, and wait for it."""
    with _lock_file(path) as fd:
        _wait_for_lock(fd, math.inf)
        yield


@contextmanager
def lease(path: Path) -> Iterator[None]:
    """Hold a shared lock while writing, so that a later run can wait for a dead run's last workers."""
    with _lock_file(path) as fd:
        try_lock(fd, shared=True, quiet=True)
        yield


def wait_for_leases(paths: Iterable[Path]) -> None:
    """Wait until the workers of a run that died have ended; they do so within seconds of their parent.

    Raises:
        TargetError: some still write after 20 s.
    """
    deadline_s = time.monotonic() + _LEASE_WAIT_S
    for path in paths:
        with _lock_file(path) as fd:
            if not _wait_for_lock(fd, deadline_s):
                raise TargetError("workers of an earlier run still write into the target: end them first")


def _wait_for_lock(fd: int, deadline_s: float) -> bool:
    while not try_lock(fd, quiet=True):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_LOCK_POLL_S)
    return True


def sync(folder: Path) -> None:
    """Bring everything of the file system that holds `folder` to the disk (syncfs)."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if libc.syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(fd)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write atomically and durably: the file is whole under its name or not there."""
    partial = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(value, file)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON object, or None where the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def fsync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(folder: SplitFolder, record: dict[str, Any]) -> None:
    """Give the checked and synced staging tree its final name; safe to repeat after a crash at any point.

    With the intent on the disk, what stands under the final names is known to be this run's. A split that is not
    there yet appears by one rename; classes added to a published one come in one by one, before the manifest that
    lists them.
    """
    write_json(folder.intent, record)
    if folder.tree.exists():
        if folder.published.exists():
            for entry in sorted(folder.tree.iterdir()):
                entry.rename(folder.published / entry.name)
            folder.tree.rmdir()
            fsync_folder(folder.published)
            _publish_manifest(folder)
        else:
            _publish_manifest(folder)
            folder.tree.rename(folder.published)
    _publish_manifest(folder)
    fsync_folder(folder.target)
    write_json(folder.record, record)
    clear(folder)
    sync(folder.target)


def _publish_manifest(folder: SplitFolder) -> None:
    if folder.new_manifest.exists():
        folder.new_manifest.replace(folder.manifest)


def clear(folder: SplitFolder) -> None:
    """Remove the unfinished run of a split: all at once by its name, then file by file."""
    doomed = folder.root / f"{folder.split}.removing"
    if doomed.exists():  # what an earlier removal did not get to the end of
        shutil.rmtree(doomed)
    if folder.home.exists():
        folder.home.rename(doomed)
        shutil.rmtree(doomed)
