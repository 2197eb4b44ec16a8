"""Crashes at every step of making an image: nothing half made has its name, no byte of an archive is lost."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import disks
import factory
import psutil
import pytest

from imagenet_unpack.checking.image import check_image
from imagenet_unpack.reporter import NullReporter
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.run.executors import SerialExecutor
from imagenet_unpack.run.image import ChosenMethod, ImageSummary, Options, make_images
from imagenet_unpack.run.imageclaim import restore
from imagenet_unpack.sources.imagerecord import is_image
from imagenet_unpack.targets.durable import Disk

Kind = Literal["kill", "power cut", "torn"]


class CrashError(BaseException):
    """The machine stops here."""


class CrashingDisk(Disk):
    """Stops before the `last`th operation and leaves what a crash of this kind leaves.

    - kill: everything that was done.
    - power cut: of each file what it was when it was synced last; files that never were are empty.
    - torn: the same, with half of what was written to the archive since.

    Args:
        watched: the archive.
        last: after how many operations; -1: never.
        kind: what is left.
    """

    def __init__(self, watched: Path, last: int = -1, kind: Kind = "kill") -> None:
        super().__init__()
        self.events: list[tuple[str, str]] = []
        self._watched = watched
        self._last = last
        self._kind = kind
        self._synced = {watched: watched.read_bytes()}

    @property
    def steps(self) -> int:
        return len([kind for kind, _ in self.events if kind != "synced"])

    def step(self, operation: str, path: Path) -> None:
        if self.steps == self._last:
            if self._kind != "kill":
                self._cut()
            raise CrashError
        self.events.append((operation, path.name))

    def synced(self, path: Path, *, everything: bool = False) -> None:
        self.events.append(("synced", "everything" if everything else path.name))
        files = path.rglob("*") if everything else [path]
        self._synced |= {file: file.read_bytes() for file in files if file.is_file()}

    def _cut(self) -> None:
        state = self._watched.with_name(f".{self._watched.name}.imagenet_unpack")
        for file in state.glob("*"):
            if file.name in ("image", "lock") or file.suffix == ".members":
                file.write_bytes(self._synced.get(file, b""))
        now, before = self._watched.read_bytes(), self._synced[self._watched]
        if self._kind == "torn" and now[:512] == before[:512]:
            before = now[: (len(now) + len(before)) // 2]
        self._watched.write_bytes(before)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A train archive whose length is no multiple of a device block."""
    inner = {wnid: factory.tar(factory.images(wnid, [b"abc" * 400, b""])) for wnid in factory.WNIDS[:3]}
    path = factory.write(tmp_path / "ILSVRC2012_img_train.tar", factory.train_tar(inner) + bytes(512))
    assert path.stat().st_size % 4096
    return path


def make(archive: Path, method: ChosenMethod, disk: Disk) -> ImageSummary:
    options = Options(
        output=archive.parent / "out.sqfs",
        planners={"train": lambda _: factory.train_plan(archive)},
        classes=None,
        verify=lambda _: None,
        method=method,
        layouts=("index", "wnid"),
        disk=lambda _: disk,
    )
    return make_images(options, SerialExecutor(), NullReporter(), Cancel())


def is_whole(path: Path) -> bool:
    return not any(split.problems for split in check_image(path, deep=True, workers=1))


def steps_of(task: Callable[[Disk], object], archive: Path) -> int:
    disk = CrashingDisk(archive)
    task(disk)
    return disk.steps


def crash(task: Callable[[Disk], object], archive: Path, last: int, kind: Kind) -> None:
    with pytest.raises(CrashError):
        task(CrashingDisk(archive, last, kind))


def state_folder(path: Path) -> Path:
    return path.with_name(f".{path.name}.imagenet_unpack")


def test_a_copy_appears_only_when_whole_and_the_same_command_ends_it(archive: Path) -> None:
    output = archive.parent / "out.sqfs"
    steps = steps_of(lambda disk: make(archive, "copy", disk), archive)
    whole = output.read_bytes()
    assert steps > 5
    for last in range(steps):
        output.unlink()
        crash(lambda disk: make(archive, "copy", disk), archive, last, "kill")
        assert not output.exists() or is_whole(output)
        assert make(archive, "copy", Disk()).run.exit_code == 0
        assert output.read_bytes() == whole
        assert sorted(entry.name for entry in archive.parent.iterdir()) == [archive.name, "out.sqfs"]


def require_archive_or_image(archive: Path, before: bytes) -> None:
    if is_image(archive):
        assert is_whole(archive)
    else:
        assert archive.read_bytes()[: len(before)] == before


@pytest.mark.parametrize("kind", ["kill", "power cut", "torn"])
@pytest.mark.parametrize("way_on", ["restore", "again"])
def test_in_place_is_the_archive_or_the_image_after_a_crash_anywhere(archive: Path, way_on: str, kind: Kind) -> None:
    before, mtime_ns = archive.read_bytes(), archive.stat().st_mtime_ns
    steps = steps_of(lambda disk: make(archive, "in-place", disk), archive)
    image = archive.read_bytes()
    assert is_whole(archive)
    assert steps > 8
    restore(archive, Disk())
    for last in range(steps):
        crash(lambda disk: make(archive, "in-place", disk), archive, last, kind)
        require_archive_or_image(archive, before)
        if way_on == "again":
            assert make(archive, "in-place", Disk()).run.exit_code == 0
            assert is_whole(archive)
            assert len(archive.read_bytes()) == len(image)
        if is_image(archive) or state_folder(archive).exists():
            restore(archive, Disk())
        assert archive.read_bytes() == before
        os.utime(archive, ns=(mtime_ns, mtime_ns))  # the writing of a simulated cut has changed it
        assert list(archive.parent.iterdir()) == [archive]


@pytest.mark.parametrize("kind", ["kill", "power cut"])
def test_restore_is_the_archive_or_the_image_after_a_crash_anywhere(archive: Path, kind: Kind) -> None:
    before, mtime_ns = archive.read_bytes(), archive.stat().st_mtime_ns
    make(archive, "in-place", Disk())
    image = archive.read_bytes()
    steps = steps_of(lambda disk: restore(archive, disk), archive)
    assert steps > 5
    for last in range(steps):
        archive.write_bytes(image)
        crash(lambda disk: restore(archive, disk), archive, last, kind)
        require_archive_or_image(archive, before)
        if is_image(archive) or state_folder(archive).exists():
            restore(archive, Disk())
        assert archive.read_bytes() == before
        assert kind != "kill" or archive.stat().st_mtime_ns == mtime_ns
        assert list(archive.parent.iterdir()) == [archive]


def test_what_undoes_a_conversion_is_on_the_disk_before_the_archive_is_touched(archive: Path) -> None:
    disk = CrashingDisk(archive)
    make(archive, "in-place", disk)
    name = archive.name
    touched = [number for number, event in enumerate(disk.events) if event[1] == name and event[0] != "synced"]
    synced = [number for number, event in enumerate(disk.events) if event == ("synced", name)]
    kept = [number for number, (kind, path) in enumerate(disk.events) if kind == "rename" and "original" in path]
    folder_synced = disk.events.index(("synced", state_folder(archive).name), kept[0])
    appended, headed = disk.events.index(("append", name)), disk.events.index(("write superblock", name))
    assert kept[0] < folder_synced < touched[0] == appended
    assert [number for number in synced if appended < number < headed]  # tables first
    assert [number for number in synced if headed < number]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["copy", "in-place"])
def test_a_kill_at_any_time(base: Path, tmp_path: Path, method: str) -> None:
    archives = Path(shutil.copytree(base, tmp_path / "archives"))
    before = {path: path.read_bytes() for path in archives.glob("*.tar")}
    output = archives / "ImageNet.sqfs"
    command = [
        sys.executable, "-m", "imagenet_unpack", "image", "--base-dir", str(archives), "--workers", "2", "--progress",
        "none", "--method", method, "--yes", "--min-free-space", "0",
    ]  # fmt: skip
    for number in itertools.count():
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        time.sleep(0.25 + 0.04 * number)
        ended = process.poll() is not None
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 15
        while _session_lives(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for path, content in before.items():
            if is_image(path):
                assert is_whole(path)
            else:
                assert path.read_bytes()[: len(content)] == content
        assert not output.exists() or is_whole(output)
        if ended:
            break
    for path, content in before.items():
        if method == "in-place":
            restore(path, Disk())
        assert path.read_bytes() == content


def _session_lives(session: int) -> bool:
    for each in psutil.process_iter():
        try:
            if os.getsid(each.pid) == session and each.status() != psutil.STATUS_ZOMBIE:
                return True
        except (ProcessLookupError, psutil.Error):
            continue
    return False


CUT = [(kind, "in-place") for kind in disks.KINDS] + [("ext4", "copy"), ("xfs", "reflink"), ("btrfs", "reflink")]


@pytest.mark.root
@pytest.mark.parametrize(("kind", "method"), CUT)
def test_a_power_cut_at_any_step_of_making_an_image(
    archive: Path, tmp_path: Path, kind: str, method: ChosenMethod
) -> None:
    before = archive.read_bytes()
    with disks.snapshot_disk(tmp_path, kind) as lower:
        own = Path(shutil.copy2(archive, lower.mount / archive.name))
        output = lower.mount / "out.sqfs"
        os.sync()
        disk = disks.SteppedDisk(lower)
        assert make(own, method, disk).run.exit_code == 0
        whole = (own if method == "in-place" else output).read_bytes()
        disk.step("end", own)
        for number, image in enumerate(disk.images):
            with lower.shown(image):
                if output.exists():
                    assert output.read_bytes() == whole, disk.steps[number]
                if method != "in-place":
                    assert own.read_bytes() == before
                    assert make(own, method, Disk()).run.exit_code == 0
                    assert output.read_bytes() == whole
                    continue
                require_archive_or_image(own, before)
                if number % 2:
                    assert make(own, method, Disk()).run.exit_code == 0
                    assert is_whole(own)
                if is_image(own) or state_folder(own).exists():
                    restore(own, Disk())
                assert own.read_bytes() == before
                assert own.stat().st_mtime_ns == archive.stat().st_mtime_ns
                assert not state_folder(own).exists()


@pytest.mark.root
@pytest.mark.parametrize("kind", disks.KINDS)
def test_a_power_cut_at_any_step_of_restoring_an_archive(archive: Path, tmp_path: Path, kind: str) -> None:
    before = archive.read_bytes()
    with disks.snapshot_disk(tmp_path, kind) as lower:
        own = Path(shutil.copy2(archive, lower.mount / archive.name))
        make(own, "in-place", Disk())
        os.sync()
        disk = disks.SteppedDisk(lower)
        restore(own, disk)
        disk.step("end", own)
        for image in disk.images:
            with lower.shown(image):
                require_archive_or_image(own, before)
                if is_image(own) or state_folder(own).exists():
                    restore(own, Disk())
                assert own.read_bytes() == before
                assert own.stat().st_mtime_ns == archive.stat().st_mtime_ns
