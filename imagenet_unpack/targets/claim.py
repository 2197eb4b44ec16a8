"""Make a target this run's: the state folder, a trial of its file system, locks and owner files."""

from __future__ import annotations

import os
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from imagenet_unpack.errors import TargetError, reason
from imagenet_unpack.model import Part
from imagenet_unpack.targets import records
from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.targets.locks import InUseError, LockFile, Pause, turn, wait_for_leases
from imagenet_unpack.targets.owner import Owner, wait_for_owners
from imagenet_unpack.targets.paths import SplitPaths, state_folder
from imagenet_unpack.targets.split import Split
from imagenet_unpack.targets.states import State

_RECORD, _RECORD_LOCK = "record.json", "record.lock"
_RECORD_WAIT_S = 2.0
_POLL_S = 0.05
_MOUNTINFO = Path("/proc/self/mountinfo")
# FUSE file systems over object stores: renaming a folder copies and deletes each object, or does not exist at all.
_OBJECT_STORES = {
    "fuse.s3fs", "fuse.rclone", "fuse.goofys", "fuse.gcsfuse", "fuse.blobfuse", "fuse.blobfuse2", "fuse.mountpoint-s3",
    "fuse.geesefs", "fuse.s3ql", "fuse.ossfs", "fuse.cosfs", "fuse.obsfs",
}  # fmt: skip


def claim_target(target: Path, disk: Disk | None = None) -> None:
    """Make the target and its state folder, or recognise them as this program's.

    Raises:
        TargetError: it is not a folder, cannot be written, or holds a `.imagenet_unpack` of something else.
    """
    root = state_folder(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            root.mkdir()
            _share_with_group(target, root)
        if not stat.S_ISDIR(root.lstat().st_mode):
            raise TargetError(f"{root} is a link or a file, not a folder of this program: move it away")
        if _recorded(root):
            return
        with turn(root / _RECORD_LOCK):
            if not _recorded(root):
                records.save(disk or Disk(), root / _RECORD, records.TargetRecord())
    except FileExistsError as error:
        raise TargetError(f"{error.filename} is in the way: it is not a folder") from error
    except OSError as error:
        raise TargetError(
            f"{error.filename or target} cannot be used in the target: {reason(error)}: choose another --target-dir"
        ) from error


def _recorded(root: Path) -> bool:
    """Say whether the record is there; where other things are but no record, look again for a while."""
    deadline_s = time.monotonic() + _RECORD_WAIT_S
    while records.load(root / _RECORD, records.TargetRecord) is None:
        others = [name for name in os.listdir(root) if not name.startswith(_RECORD) and name != _RECORD_LOCK]
        # Version 0.1.0 made `locks` before the record.
        if not [name for name in others if name != "locks"]:
            return False
        # On some network file systems a file that is being replaced vanishes for a moment.
        if time.monotonic() > deadline_s:
            raise TargetError(f"{root} is not a folder of this program: choose another --target-dir or move it away")
        time.sleep(_POLL_S)
    return True


def _share_with_group(target: Path, root: Path) -> None:
    """Give the state folder, and so all that is made in it, the group of a target that a group shares."""
    above, made = target.stat(), root.stat()
    if above.st_mode & stat.S_IWGRP and above.st_gid != made.st_gid:
        with suppress(OSError):
            os.chown(root, -1, above.st_gid)
            root.chmod(stat.S_IMODE(made.st_mode) | stat.S_ISGID)


def try_file_system(target: Path, disk: Disk, *, mountinfo: Path = _MOUNTINFO) -> None:
    """Try in the state folder what a run will need: create, rename a folder, lock, sync.

    Raises:
        TargetError: the file system cannot do it.
    """
    kind = mounted_kind(target, mountinfo)
    if kind in _OBJECT_STORES:
        raise TargetError(
            f"{target} is on {kind}, an object store, where a folder cannot be renamed at once: unpack to another "
            "file system and copy the tree there"
        )
    root = state_folder(target)
    before = root / f"trial.{secrets.token_hex(8)}"
    after = before.with_name(f"{before.name}.renamed")
    doing = "make a folder"
    try:
        disk.make_folder(before)
        doing = "write a file"
        disk.write_file(before / "file", b"trial\n", sync=False)
        doing = "rename a folder"
        disk.rename(before, after)
        if os.path.lexists(before) or (after / "file").read_bytes() != b"trial\n":
            raise TargetError(f"{target}: its file system does not rename folders at once: unpack to another one")
        doing = "sync"
        disk.sync_folder(after)
    except OSError as error:
        raise TargetError(
            f"{target}: its file system failed a trial (could not {doing}: {reason(error)}): choose another "
            "--target-dir"
        ) from error
    finally:
        for folder in (before, after):
            disk.remove_tree(folder)


def mounted_kind(path: Path, mountinfo: Path = _MOUNTINFO) -> str:
    """Return the type of the file system that holds `path`, such as `fuse.sshfs`, or "" where it is unknown.

    Format: proc_pid_mountinfo(5).
    """
    with suppress(OSError):
        device = path.stat().st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        for line in mountinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            left, _, right = line.partition(" - ")
            if left.split(" ")[2:3] == [wanted]:
                return right.split(" ", 1)[0]
    return ""


class Claim:
    """The locks on one split; a run that finds it published shares them with others that only read."""

    def __init__(self, split: Split, part: Part, pause: Pause | None, *, restart: bool) -> None:
        self.split = split
        self._restart = restart
        self._part = part
        self._pause = pause
        self._paths = split.paths
        self._what = f"the {split.paths.split} split of {split.paths.target}"
        self._stack = ExitStack()
        self._lock = self._stack.enter_context(LockFile(self._paths.lock, self._what))
        self._reading = False

    def close(self) -> None:
        """Let go of everything; never raises."""
        self._stack.close()

    def take(self) -> None:
        """Take the locks: shared with other readers where the split is published, else for writing.

        Raises:
            TargetError: another run is at work, or there are no locks to wait for.
        """
        if self._pause is not None:
            self._lock.require_locks()
        while True:
            self._reading = not self._restart and self.split.look() is State.PUBLISHED
            if not self._lock.attempt(shared=self._reading or not self._part.whole):
                self._lock.blocked(self._pause)
            elif self._restart or self._reading == (self.split.look() is State.PUBLISHED):
                break
            else:
                self._lock.unlock()  # it changed between the look and the lock
        if not self._reading:
            self._begin_to_write()

    def write(self) -> None:
        """Go from reading to writing, for classes to be added or files to be replaced.

        Raises:
            TargetError: another run is at work.
        """
        if self._reading:
            self._lock.unlock()
            self._lock.take(shared=not self._part.whole, pause=self._pause)
            self._reading = False
            self._begin_to_write()

    def _begin_to_write(self) -> None:
        part, paths = self._part, self._paths
        note = "" if part.whole else ", a part of several"
        self._lock.sign(note)
        _require_no_old_version(paths, self._what)
        if not part.whole:
            what = f"part {part.index}/{part.count} of {self._what}"
            lock = self._stack.enter_context(LockFile(paths.part_lock(part.name), what))
            lock.take(pause=self._pause)
            lock.sign()
        pause = self._pause or time.sleep
        mine = [paths.owner(part.name), paths.owner(Part().name)]
        wait_for_owners(paths.owners() if part.whole else mine, self._what, pause=pause)
        wait_for_leases(paths.leases() if part.whole else [paths.lease(part.name)])
        if not self.split.disk.tried:
            try_file_system(paths.target, self.split.disk)
            self.split.disk.tried = True
        owner = Owner(paths.owner(part.name), self.split.disk)
        self._stack.callback(owner.close)
        self.split.owner = owner
        with turn(paths.opening_lock):
            if self._restart:
                self.split.discard()
            else:
                self.split.look()
            self.split.recover()


def _require_no_old_version(paths: SplitPaths, what: str) -> None:
    """Respect the locks of version 0.1.0, which are in a folder of their own."""
    for path in _existing(sorted(paths.legacy_locks.glob(f"{paths.split}.*"))):
        with LockFile(path, what) as lock:
            if not lock.attempt(quiet=True):
                raise InUseError(f"{what} is in use by {lock.holder()}, of version 0.1.0: wait for it or stop it")


def _existing(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.is_file() and not path.is_symlink()]


@contextmanager
def claimed(split: Split, part: Part, pause: Pause | None = None, *, restart: bool = False) -> Iterator[Claim]:
    """Hold the locks of a split for a run.

    Args:
        split: the split.
        part: the part of the plan that the run is to do.
        pause: given: wait for another run, and call this between looks; it may raise to end the waiting.
        restart: throw the unfinished run away.
    """
    claim = Claim(split, part, pause, restart=restart)
    try:
        claim.take()
        yield claim
    finally:
        claim.close()
