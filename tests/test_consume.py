"""`--consume`: every image is in the archive or on the disk at any time, and both together fit where two would not."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from disks import disk
from program import SLOW, Run, Tree, serial, tree

from imagenet_unpack.cli import main as cli
from imagenet_unpack.dataset import kinds
from imagenet_unpack.dataset.synth import SynthSpec, write_archives, write_files
from imagenet_unpack.targets import journal
from imagenet_unpack.targets.paths import SplitPaths

CONSUME = ("--consume", "--yes")
TRAIN = "ILSVRC2012_img_train.tar"


def used(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.fixture
def own(base: Path, tmp_path: Path) -> Path:
    """Archives that may be destroyed."""
    folder = tmp_path / "own"
    shutil.copytree(base, folder)
    return folder


def test_frees_what_is_on_the_disk(
    own: Path, tmp_path: Path, expected: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: (used(path), path.stat().st_size) for path in own.glob("*.tar")}
    target = tmp_path / "t"
    assert serial(own, target, *CONSUME) == 0
    assert tree(target) == expected
    for path, (blocks, size) in before.items():
        assert path.stat().st_size == size
        assert used(path) < blocks / 2
    assert serial(own, target) == 0
    assert cli.main(["check", str(target), "--deep"]) == 0
    next((target / "train").glob("*/*")).unlink()
    capsys.readouterr()
    assert cli.main(["check", str(target)]) == 4
    assert "consumed" in "".join(capsys.readouterr())


def test_a_stopped_run_is_continued(own: Path, tmp_path: Path, expected: Tree) -> None:
    target = tmp_path / "t"
    run = Run(own, target, *SLOW, *CONSUME).at_work()
    paths = SplitPaths(target, "train")
    while len(journal.read(paths.home, "train")) < 3:
        assert run.process.poll() is None
        time.sleep(0.05)
    run.process.terminate()
    assert run.end()[0] == 143
    done = len(journal.read(paths.home, "train"))
    assert used(own / TRAIN) < (own / TRAIN).stat().st_size * (1 - (done - 1) / 8)
    assert serial(own, target, "--restart") == 5  # nothing else has these images
    assert len(journal.read(paths.home, "train")) == done
    code, result, err = Run(own, target).end()  # without --consume too: the changed time is no other archive
    assert code == 0, err
    assert result["splits"]["train"]["shards_skipped"] == done
    assert tree(target) == expected


@pytest.mark.slow
def test_kills_lose_no_image(own: Path, tmp_path: Path, expected: Tree) -> None:
    target, chance = tmp_path / "t", random.Random(5)
    for _ in range(4):
        run = Run(own, target, *SLOW, *CONSUME)
        time.sleep(chance.uniform(0.3, 1.5))
        run.process.kill()
        run.process.communicate()
        run.wait_until_gone(15)
    code, _, err = Run(own, target, *CONSUME).end()
    assert code == 0, err
    assert tree(target) == expected


@pytest.mark.slow
def test_who_waits_takes_over_from_a_dead_run(own: Path, tmp_path: Path, expected: Tree) -> None:
    """The archive has changed since the second run planned it, and is none the less the same."""
    target = tmp_path / "t"
    first = Run(own, target, *SLOW, *CONSUME).at_work()
    second = Run(own, target, "--wait")
    paths = SplitPaths(target, "train")
    while len(journal.read(paths.home, "train")) < 5:
        assert first.process.poll() is None
        time.sleep(0.05)
    first.process.kill()
    first.process.communicate()
    code, _, err = second.end()
    assert code == 0, err
    assert tree(target) == expected


class TestRefused:
    def test_without_a_confirmation(self, own: Path, tmp_path: Path) -> None:
        assert serial(own, tmp_path / "t", "--consume") == 2
        assert not (tmp_path / "t").exists()

    @pytest.mark.parametrize("options", [("--part", "0/2"), ("--durability", "none"), ("--repair",)])
    def test_with_what_contradicts_it(self, own: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
        assert serial(own, tmp_path / "t", *CONSUME, *options) == 2

    def test_an_archive_with_two_names(self, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        os.link(own / TRAIN, tmp_path / "other")
        assert serial(own, tmp_path / "t", *CONSUME) == 5
        assert "hard links" in capsys.readouterr().err
        assert not (tmp_path / "t").exists()

    @pytest.mark.slow
    def test_an_archive_that_another_run_reads(self, own: Path, tmp_path: Path) -> None:
        first = Run(own, tmp_path / "t1", *SLOW).at_work()
        assert serial(own, tmp_path / "t2", *CONSUME) == 5
        assert first.end()[0] == 0

    @pytest.mark.root
    def test_a_file_system_without_holes(self, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with mounted(tmp_path / "ram", "ramfs", "mode=755"):
            shutil.copytree(own, tmp_path / "ram" / "in")
            assert serial(tmp_path / "ram" / "in", tmp_path / "t", *CONSUME) == 5
            assert "holes" in capsys.readouterr().err


@contextmanager
def mounted(folder: Path, kind: str, options: str) -> Iterator[Path]:
    if os.geteuid():
        pytest.skip("needs root to mount a file system")
    folder.mkdir()
    subprocess.run(["mount", "-t", kind, "-o", options, kind, str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def used_bytes(mount: Path) -> int:
    stat = os.statvfs(mount)
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize


class Peak:
    """Samples how much of a file system is used while its block runs."""

    def __init__(self, mount: Path) -> None:
        self._mount = mount
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self.before_bytes = self.peak_bytes = used_bytes(self._mount)

    def _sample(self) -> None:
        while not self._ended.wait(0.01):
            self.peak_bytes = max(self.peak_bytes, used_bytes(self._mount))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@pytest.mark.root
@pytest.mark.parametrize("kind", ["official", "folder"])
def test_fits_where_two_copies_do_not(tmp_path: Path, kind: str) -> None:
    """Peak use: the tree and at most two shards a worker, and 1 %."""
    spec = SynthSpec(classes=40, images_per_class=20, val_images=0, mean_bytes=110_000)
    with disk(tmp_path, "ext4", 150 << 20, "-m", "0", "-i", "8192") as made:
        archives, target = made.mount / "in", made.mount / "t"
        write_files(archives, kinds.files_of(kind, spec))
        files = list(archives.rglob("*.tar"))
        size = sum(path.stat().st_size for path in files)
        stat = os.statvfs(made.mount)
        assert stat.f_bavail * stat.f_frsize < size  # no room for both
        code, _, err = Run(archives, target).end()
        assert code == 5, err
        with Peak(made.mount) as peak:
            code, _, err = Run(archives, target, *CONSUME).end()
        assert code == 0, err
        written = sum(path.stat().st_blocks * 512 for path in target.rglob("*"))
        sizes = sorted(size_bytes for path in files for size_bytes in inner_sizes(path))
        growth = peak.peak_bytes - peak.before_bytes
        assert growth <= max(0, written - size) + sum(sizes[-4:]) + 0.01 * size
        assert cli.main(["check", str(target), "--deep"]) == 0


def inner_sizes(path: Path) -> list[int]:
    """Return the sizes of the inner tars of an archive, or that of an inner tar itself."""
    with tarfile.open(path) as tar:
        return [member.size for member in tar if member.name.endswith(".tar")] or [path.stat().st_size]


@pytest.mark.root
def test_headers_do_not_keep_the_space_of_their_extents(tmp_path: Path) -> None:
    """btrfs keeps an extent, of up to 128 MiB, as long as one block of it is in use."""
    with disk(tmp_path, "btrfs", 1 << 30) as made:
        archives, target = made.mount / "in", made.mount / "t"
        write_archives(archives, SynthSpec(classes=10, images_per_class=30, val_images=60, mean_bytes=110_000))
        os.sync()
        size = sum(path.stat().st_size for path in archives.glob("*.tar"))
        before = used_bytes(made.mount)
        code, _, err = Run(archives, target, *CONSUME).end()
        assert code == 0, err
        os.sync()
        assert used_bytes(made.mount) - before < 0.2 * size
