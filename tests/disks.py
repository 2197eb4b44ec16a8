"""Small file systems on loop devices that lose their power: by their own shutdown call, or by a look at them in flight.

A shutdown without a log flush is known to ext4 and XFS: later calls fail, and what was not synced is lost. A snapshot
is a copy of the loop device's file, taken at once by sharing its extents while the file system is at work: what the
kernel had not written to the device yet is not in it. It works for every file system, and many can be taken of one run.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imagenet_unpack.targets import durable

# EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN: _IOR('X', 125, __u32); 2 is "no log flush" (fs/ext4/ext4.h, xfs_fs.h).
SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2
FICLONE = 0x40049409  # include/uapi/linux/fs.h
MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}
KINDS = tuple(MKFS)
SIZE_BYTES = 320 << 20  # the smallest XFS has 300 MB


class Disk:
    """A file system in a file; `mount` is where it is seen."""

    def __init__(self, kind: str, image: Path, mount: Path) -> None:
        self.kind = kind
        self.image = image
        self.mount = mount

    def shut_down(self) -> None:
        """Let every later call fail; not of btrfs."""
        fd = os.open(self.mount, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def power_cut(self) -> None:
        """Shut down, and mount what is left."""
        self.shut_down()
        self.remount()

    def remount(self) -> None:
        """Mount again; what was shut down is as after a power cut."""
        unmount(self.mount)
        deadline_s = time.monotonic() + 10
        while subprocess.run(["losetup", "-j", str(self.image)], check=True, capture_output=True).stdout:
            if time.monotonic() > deadline_s:  # it would be mounted again as it is: dead
                pytest.skip("another mount namespace holds the disk")
            time.sleep(0.1)
        self.show(self.image)

    def show(self, image: Path) -> None:
        """Mount this image: its own or a snapshot."""
        mount_image(image, self.mount)

    @contextmanager
    def shown(self, image: Path) -> Iterator[None]:
        """Show a snapshot in the place of the disk until the end of the block, and remove it."""
        unmount(self.mount)
        self.show(image)
        try:
            yield
        finally:
            unmount(self.mount)
            self.show(self.image)
            image.unlink()

    def snapshot(self, number: int) -> Path:
        """Copy the image as it is now."""
        copy = self.image.with_name(f"snapshot-{number:04d}")
        with open(self.image, "rb") as source, open(copy, "wb") as target:
            fcntl.ioctl(target, FICLONE, source.fileno())
        return copy


def mount_image(image: Path, mount: Path) -> None:
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)


def unmount(mount: Path) -> None:
    """Unmount a disk, also a moment after what used it was ended."""
    deadline_s = time.monotonic() + 10
    while (done := subprocess.run(["umount", str(mount)], check=False, capture_output=True)).returncode:
        assert time.monotonic() < deadline_s, done.stderr
        time.sleep(0.1)


def forget_owner(target: Path) -> None:
    """Remove the owner files that a run left, which say nothing after a power cut: the next run would watch them."""
    for path in target.glob(".imagenet_unpack/*.owner"):
        path.unlink()


@contextmanager
def disk(
    folder: Path, kind: str = "ext4", size_bytes: int = SIZE_BYTES, *options: str, image: Path | None = None
) -> Iterator[Disk]:
    """Make a file system, with options of its mkfs, and mount it on `folder/disk`."""
    if os.geteuid() or shutil.which(MKFS[kind][0]) is None:
        pytest.skip(f"needs root and {MKFS[kind][0]}")
    # In memory, a sync takes no time, and what is synced is in the file nevertheless.
    place = tempfile.TemporaryDirectory(prefix="disk-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    with place as name:
        image, mount = image or Path(name, "image"), folder / "disk"
        with open(image, "wb") as file:
            file.truncate(size_bytes)
        subprocess.run([*MKFS[kind], *options, str(image)], check=True, capture_output=True)
        mount.mkdir(exist_ok=True)
        mount_image(image, mount)
        try:
            yield Disk(kind, image, mount)
        finally:
            unmount(mount)
            image.unlink()


@contextmanager
def snapshot_disk(folder: Path, kind: str, size_bytes: int = SIZE_BYTES) -> Iterator[Disk]:
    """Make a file system of which snapshots can be taken: its image lies on an XFS."""
    host = folder / "host"
    host.mkdir(exist_ok=True)
    with disk(host, "xfs", 16 << 30) as outer, disk(folder, kind, size_bytes, image=outer.mount / "image") as made:
        yield made


class Snapshots:
    """Takes snapshots of a disk while its block runs."""

    def __init__(self, disk: Disk, interval_s: float) -> None:
        self.images: list[Path] = []
        self._disk = disk
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._take)

    def _take(self) -> None:
        while not self._ended.wait(self._interval_s):
            self.images.append(self._disk.snapshot(len(self.images)))

    def __enter__(self) -> Snapshots:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def shown(self) -> Iterator[Path]:
        """Yield each snapshot, mounted in the disk's place, and remove it."""
        for image in self.images:
            with self._disk.shown(image):
                yield image


class SteppedDisk(durable.Disk):
    """Takes a snapshot of the disk that it writes to before each operation.

    Attributes:
        steps: what each snapshot was taken before.
    """

    def __init__(self, lower: Disk) -> None:
        super().__init__()
        self.images: list[Path] = []
        self.steps: list[str] = []
        self._lower = lower

    def step(self, operation: str, path: Path) -> None:
        self.images.append(self._lower.snapshot(len(self.images)))
        self.steps.append(f"{operation} {path.name}")
