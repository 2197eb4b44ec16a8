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
import factory
import pytest
from disks import KINDS, Snapshots, SteppedDisk, disk, forget_owner, snapshot_disk
from program import SLOW, Run, Tree, tree

from imagenet_unpack.extract.extractor import extract_shard
from imagenet_unpack.extract.folders import FolderSink
from imagenet_unpack.extract.sink import Unpaced
from imagenet_unpack.model import Part
from imagenet_unpack.run.commits import Commits
from imagenet_unpack.run.ledger import Ledger
from imagenet_unpack.run.opening import open_split
from imagenet_unpack.run.runoptions import Options
from imagenet_unpack.targets import claim, durable
from imagenet_unpack.targets.paths import SplitPaths
from imagenet_unpack.targets.split import Split

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
def test_consuming_loses_no_image_at_any_step(tmp_path: Path, kind: str) -> None:
    """Cuts the power before each single operation of syncing, journaling, freeing and publishing shards."""
    inner = {wnid: factory.tar(factory.images(wnid, [wnid.encode() * 3000])) for wnid in factory.WNIDS[:3]}
    with snapshot_disk(tmp_path, kind) as lower:
        archive = factory.write(lower.mount / "ILSVRC2012_img_train.tar", factory.train_tar(inner))
        images, target, stepped = consuming.places(lower.mount), lower.mount / "t", SteppedDisk(lower)
        plan = factory.train_plan(archive)
        options = Options(target=target, layout="index", planners={"train": lambda _: plan}, classes=None, consume=True)
        os.sync()
        claim.claim_target(target)
        with claim.claimed(Split(SplitPaths(target, "train"), stepped), Part()) as claimed:
            run = open_split(claimed, plan, options, check=lambda *_: (), note=lambda _: None)
            ledger = Ledger(("train",), Part())
            commits = Commits(ledger, Part().name)
            for shard in ledger.open(run):
                sink = FolderSink(run.paths.tree, Unpaced())
                ledger.record(extract_shard(shard, sink, run.paths.fragment(shard.id), pace=Unpaced()))
                commits.commit()
            assert run.check_and_publish(1, lambda *_: None) == ()
        stepped.step("end", target)
        for number, image in enumerate(stepped.images):
            with lower.shown(image):
                assert not consuming.lost(images, lower.mount, target), stepped.steps[number]


@pytest.mark.parametrize("kind", ["btrfs"])  # the others: soak.py --consume
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
