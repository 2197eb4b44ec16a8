"""Images on real file systems, mounted by the kernel and by squashfuse; every byte compared."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from program import tree

from imagenet_unpack.cli import main as cli
from imagenet_unpack.errors import ExitCode

pytestmark = pytest.mark.mount
TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
MAKERS = {"ext4": ["mkfs.ext4", "-q"], "xfs": ["mkfs.xfs", "-q"], "btrfs": ["mkfs.btrfs", "-q"]}


@contextmanager
def mounted(file: Path, point: Path, *options: str) -> Iterator[Path]:
    point.mkdir()
    done = subprocess.run(["mount", "-o", ",".join(("loop", *options)), file, point], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.decode()}")
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


@contextmanager
def fuse_mounted(file: Path, point: Path, program: str) -> Iterator[Path]:
    if shutil.which(program) is None or not os.path.exists("/dev/fuse"):
        pytest.skip(f"needs {program} and /dev/fuse")
    point.mkdir()
    subprocess.run([program, file, point], check=True, capture_output=True)
    try:
        deadline = time.monotonic() + 10
        while not os.path.ismount(point):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


@pytest.fixture(params=list(MAKERS))
def disk(request: pytest.FixtureRequest, base: Path, tmp_path: Path) -> Iterator[Path]:
    """The archives on a file system of their own."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a file system")
    maker = MAKERS[request.param]
    if shutil.which(maker[0]) is None:
        pytest.skip(f"needs {maker[0]}")
    image = tmp_path / "disk"
    with open(image, "wb") as file:
        file.truncate(400 << 20)
    subprocess.run([*maker, str(image)], check=True, capture_output=True)
    with mounted(image, tmp_path / "mount") as point:
        shutil.copytree(base, point / "archives")
        yield point / "archives"


def make(archives: Path, *options: str) -> int:
    return cli.main(
        [
            "image",
            "--base-dir",
            str(archives),
            "--workers",
            "2",
            "--progress",
            "none",
            "--min-free-space",
            "0",
            *options,
        ]
    )


def used_bytes(folder: Path) -> int:
    subprocess.run(["sync", "-f", str(folder)], check=True)
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def files_of(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in root.rglob("*/*.JPEG")
        if not path.is_symlink()
    }


def test_a_mounted_image_is_the_tree(
    disk: Path, expected: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = used_bytes(disk)
    assert make(disk, "--json", "--layout", "index", "--layout", "wnid") == 0
    method = json.loads(capsys.readouterr().out)["method"]
    shares = (disk.parent.parent / "disk").exists() and method == "reflink"
    added = used_bytes(disk) - before
    image = disk / "ImageNet.sqfs"
    if shares:
        assert added < 2 << 20  # tables and manifests
    else:
        assert added > sum((disk / name).stat().st_size for name in (TRAIN, VAL))
    with mounted(image, tmp_path / "kernel", "ro") as point:
        assert tree(point) == expected
        assert (point / "by-wnid" / "train" / "n01440764").resolve() == point / "train" / "0"
        assert cli.main(["check", str(point), "--deep", "--progress", "none"]) == 0
    for program in ("squashfuse", "squashfuse_ll"):
        with fuse_mounted(image, tmp_path / program, program) as point:
            assert tree(point) == expected
    assert cli.main(["check", str(image), "--deep", "--progress", "none"]) == 0


def test_file_systems_that_share_extents_are_told_from_others(disk: Path, request: pytest.FixtureRequest) -> None:
    shares = request.node.callspec.params["disk"] in ("xfs", "btrfs")
    assert make(disk, "--method", "reflink") == (0 if shares else ExitCode.CANNOT_START)
    assert (disk / "ImageNet.sqfs").exists() == shares
    assert not [entry for entry in disk.iterdir() if entry.name.startswith(".")]


def test_in_place_mounted_by_the_kernel_and_restored(disk: Path, expected: dict[str, str], tmp_path: Path) -> None:
    before = {name: (disk / name).read_bytes() for name in (TRAIN, VAL)}
    assert make(disk, "--method", "in-place", "--yes") == 0
    for name, split in ((TRAIN, "train"), (VAL, "val")):
        with mounted(disk / name, tmp_path / split, "ro") as point:
            found = {f"{split}/{path}": digest for path, digest in files_of(point).items()}
            assert found == {path: digest for path, digest in expected.items() if path.startswith(split)}
            # What is mounted is in use.
            assert cli.main(["restore", str(disk / name)]) == ExitCode.CANNOT_START
        assert cli.main(["restore", str(disk / name)]) == 0
        assert (disk / name).read_bytes() == before[name]


def test_a_converted_archive_is_shared_as_the_archive_it_was(
    disk: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if request.node.callspec.params["disk"] == "ext4":
        pytest.skip("needs a file system that shares extents")
    assert make(disk, "--method", "reflink", "--output", str(tmp_path / "mount" / "before")) == 0
    assert make(disk, "--method", "in-place", "--yes") == 0
    assert make(disk, "--method", "reflink", "--output", str(tmp_path / "mount" / "after")) == 0
    before, after = ((tmp_path / "mount" / name).read_bytes() for name in ("before", "after"))
    assert after == before
