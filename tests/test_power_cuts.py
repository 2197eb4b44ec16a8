"""Power cuts: below a FUSE file system, where syncfs brings nothing to the disk, and below a run at work."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from program import SLOW, Run, Tree, tree

from imagenet_unpack.targets import claim, durable, journal
from imagenet_unpack.targets.paths import STATE_FOLDER

# EXT4_IOC_SHUTDOWN, _IOR('X', 125, __u32); 2 is "no log flush" (fs/ext4/ext4.h).
SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2

pytestmark = pytest.mark.root


@contextmanager
def disk(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Mount a new ext4 on `folder/disk`; yields its image and the mount."""
    if os.geteuid():
        pytest.skip("needs root to mount file systems")
    image, mount = folder / "image", folder / "disk"
    with open(image, "wb") as file:
        file.truncate(200 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    mount.mkdir()
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
    try:
        yield image, mount
    finally:
        unmount(mount)


def unmount(mount: Path) -> None:
    """Unmount a disk, also a moment after what used it was ended."""
    deadline_s = time.monotonic() + 10
    while subprocess.run(["umount", str(mount)], check=False, capture_output=True).returncode:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


@contextmanager
def bindfs(below: Path, mount: Path) -> Iterator[Path]:
    """Show a folder through FUSE."""
    if shutil.which("bindfs") is None:
        pytest.skip("needs bindfs")
    mount.mkdir(exist_ok=True)
    subprocess.run(["bindfs", str(below), str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def shut_down(mount: Path) -> None:
    """Let every later call on a file system fail."""
    fd = os.open(mount, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
    finally:
        os.close(fd)


def power_cut(image: Path, mount: Path) -> None:
    shut_down(mount)
    unmount(mount)
    deadline_s = time.monotonic() + 10
    while subprocess.run(["losetup", "-j", str(image)], check=True, capture_output=True).stdout:
        if time.monotonic() > deadline_s:  # it would be mounted again as it is: dead
            pytest.skip("another mount namespace holds the disk")
        time.sleep(0.1)
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)


def test_is_recognised(tmp_path: Path) -> None:
    with disk(tmp_path) as (_, mount), bindfs(mount, tmp_path / "fuse") as fuse:
        assert durable.needs_sync_of_each_file(fuse)
        assert not durable.needs_sync_of_each_file(mount)
        assert claim.mounted_kind(fuse).startswith("fuse")
        assert claim.mounted_kind(mount) == "ext4"


def test_what_is_published_survives_a_power_cut(base: Path, tmp_path: Path, expected: Tree) -> None:
    with disk(tmp_path) as (image, mount):
        with bindfs(mount, tmp_path / "fuse") as fuse:
            code, _, err = Run(base, fuse / "t").end()
            assert code == 0, err
        power_cut(image, mount)
        assert tree(mount / "t") == expected


def test_what_is_journaled_survives_a_power_cut(base: Path, tmp_path: Path, expected: Tree) -> None:
    with disk(tmp_path) as (image, mount):
        with bindfs(mount, tmp_path / "fuse") as fuse:
            run = Run(base, fuse / "t", *SLOW).at_work()
            time.sleep(1)
            run.process.terminate()
            code, result, err = run.end()
            assert code == 143, err
            done = result["splits"]["train"]["classes"]
            assert done > 0
        power_cut(image, mount)
        with bindfs(mount, tmp_path / "fuse") as fuse:
            code, result, err = Run(base, fuse / "t").end()
            assert code == 0, err
            assert result["splits"]["train"]["shards_skipped"] == done
        assert tree(mount / "t") == expected
        with suppress(FileNotFoundError):
            shutil.rmtree(mount / "t")


@pytest.mark.parametrize("delay_s", [0.0, 0.6, 1.3])
def test_a_disk_that_dies_stops_the_run(base: Path, tmp_path: Path, expected: Tree, delay_s: float) -> None:
    """Everything fails from some moment on, cleaning up too: that is told (6), and is no defect (1)."""
    with disk(tmp_path) as (image, mount):
        run = Run(base, mount / "t", *SLOW).at_work()
        time.sleep(delay_s)
        shut_down(mount)
        code, result, err = run.end(timeout=30)
        assert (code, result["status"]) == (6, "incomplete"), err
        assert "Input/output error" in err
        run.wait_until_gone(10)
        power_cut(image, mount)
        assert tree(mount / "t") == {}
        code, _, err = Run(base, mount / "t").end()
        assert code == 0, err
        assert tree(mount / "t") == expected


def test_consuming_loses_no_image(base: Path, tmp_path: Path, expected: Tree) -> None:
    with disk(tmp_path) as (image, mount):
        shutil.copytree(base, mount / "in")
        os.sync()
        run = Run(mount / "in", mount / "t", *SLOW, "--consume", "--yes").at_work()
        while len(journal.read(mount / "t" / STATE_FOLDER / "train", "train")) < 2:
            assert run.process.poll() is None
            time.sleep(0.05)
        shut_down(mount)
        code, _, err = run.end(timeout=30)
        assert code == 6, err
        run.wait_until_gone(10)
        power_cut(image, mount)
        code, result, err = Run(mount / "in", mount / "t", "--consume", "--yes").end()
        assert code == 0, err
        assert result["splits"]["train"]["shards_skipped"] >= 2
        assert tree(mount / "t") == expected
