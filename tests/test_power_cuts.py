"""Power cuts: below a FUSE file system, where syncfs brings nothing to the disk, and below a run at work."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import consuming
import pytest
from disks import KINDS, Snapshots, disk, forget_owner, snapshot_disk
from program import SLOW, Run, Tree, tree

from imagenet_unpack.targets import claim, durable

pytestmark = pytest.mark.root

CONSUME = ("--consume", "--yes")
RATE = ("--max-write-rate", "3MB")


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


def test_is_recognised(tmp_path: Path) -> None:
    with disk(tmp_path) as made, bindfs(made.mount, tmp_path / "fuse") as fuse:
        mount = made.mount
        assert durable.needs_sync_of_each_file(fuse)
        assert not durable.needs_sync_of_each_file(mount)
        assert claim.mounted_kind(fuse).startswith("fuse")
        assert claim.mounted_kind(mount) == "ext4"


def test_what_is_published_survives_a_power_cut(base: Path, tmp_path: Path, expected: Tree) -> None:
    with disk(tmp_path) as made:
        mount = made.mount
        with bindfs(mount, tmp_path / "fuse") as fuse:
            code, _, err = Run(base, fuse / "t").end()
            assert code == 0, err
        made.power_cut()
        assert tree(mount / "t") == expected


def test_what_is_journaled_survives_a_power_cut(base: Path, tmp_path: Path, expected: Tree) -> None:
    with disk(tmp_path) as made:
        mount = made.mount
        with bindfs(mount, tmp_path / "fuse") as fuse:
            run = Run(base, fuse / "t", *SLOW).at_work()
            time.sleep(1)
            run.process.terminate()
            code, result, err = run.end()
            assert code == 143, err
            done = result["splits"]["train"]["classes"]
            assert done > 0
        made.power_cut()
        forget_owner(mount / "t")
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
    with disk(tmp_path) as made:
        mount = made.mount
        run = Run(base, mount / "t", *SLOW).at_work()
        time.sleep(delay_s)
        made.shut_down()
        code, result, err = run.end(timeout=30)
        assert (code, result["status"]) == (6, "incomplete"), err
        assert "Input/output error" in err
        run.wait_until_gone(10)
        made.remount()
        assert tree(mount / "t") == {}
        if delay_s:  # else the owner file is watched
            forget_owner(mount / "t")
        code, _, err = Run(base, mount / "t").end()
        assert code == 0, err
        assert tree(mount / "t") == expected


@pytest.mark.parametrize("kind", KINDS)
def test_consuming_loses_no_image(base: Path, tmp_path: Path, expected: Tree, kind: str) -> None:
    """Whatever moment the power is cut at, each image is in the archive or known to be on the disk."""
    images = consuming.places(base)
    with snapshot_disk(tmp_path, kind) as disk:
        archives, target = disk.mount / "in", disk.mount / "t"
        shutil.copytree(base, archives)
        os.sync()
        with Snapshots(disk, 0.15) as snapshots:
            code, _, err = Run(archives, target, *RATE, *CONSUME).end()
            assert code == 0, err
        begun = 0
        for number, _ in enumerate(snapshots.shown()):
            assert not consuming.lost(images, archives, target)
            if consuming.unfinished(target):
                begun += 1
                if begun % 4 == 1:
                    forget_owner(target)
                    code, _, err = Run(archives, target, *CONSUME).end()
                    assert code == 0, (number, err)
                    assert tree(target) == expected
        assert begun > 3
