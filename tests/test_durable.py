from __future__ import annotations

import errno
import logging
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from crashing import contents

from imagenet_unpack.targets.durable import Disk, copy_of, file_system_magic, needs_sync_of_each_file, read_file


class Recorder(Disk):
    """Notes each operation."""

    def __init__(self, *, sync_each_file: bool = False, durable: bool = True) -> None:
        super().__init__(sync_each_file=sync_each_file, durable=durable)
        self.steps: list[str] = []

    def step(self, operation: str, path: Path) -> None:
        self.steps.append(operation)


def test_a_file_is_synced_before_it_has_its_name(tmp_path: Path) -> None:
    disk = Recorder()
    disk.write_file(tmp_path / "a", b"1")
    assert disk.steps == ["create", "sync", "rename", "sync"]
    disk.write_file(tmp_path / "a", b"2")
    assert contents(tmp_path) == {"a": b"2"}


def test_without_durability_only_state_files_are_synced(tmp_path: Path) -> None:
    disk = Recorder(durable=False)
    disk.append(tmp_path / "journal", b"x")
    disk.sync_all(tmp_path)
    disk.sync_folder(tmp_path)
    disk.sync_file(tmp_path / "journal")
    assert "sync" not in disk.steps
    disk.write_file(tmp_path / "plan.json", b"{}")
    assert "sync" in disk.steps


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    class Failing(Disk):
        def rename(self, source: Path, destination: Path) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

    Disk().write_file(tmp_path / "a", b"old")
    with pytest.raises(OSError, match="Read-only"):
        Failing().write_file(tmp_path / "a", b"new")
    assert contents(tmp_path) == {"a": b"old"}


@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_files_follow_the_umask(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        Disk().write_file(tmp_path / "a", b"")
        Disk().append(tmp_path / "b", b"")
    finally:
        os.umask(old)
    for name in "ab":
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_nothing_is_read_or_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"real")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(OSError, match="symbolic links"):
        read_file(tmp_path / "link")
    with pytest.raises(OSError, match="symbolic links"):
        Disk().append(tmp_path / "link", b"x")
    Disk().write_file(tmp_path / "link", b"new")  # replaces the link itself
    assert (tmp_path / "real").read_bytes() == b"real"


def test_merging_moves_everything(tmp_path: Path) -> None:
    for name in ("from/a/1", "from/a/2", "from/b/3", "into/a/0"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    Disk().merge_folder(tmp_path / "from", tmp_path / "into")
    assert {name for name, data in contents(tmp_path).items() if data} == {
        "into/a/0", "into/a/1", "into/a/2", "into/b/3"
    }  # fmt: skip
    assert not (tmp_path / "from").exists()


def test_removing_never_raises(tmp_path: Path) -> None:
    Disk().remove_tree(tmp_path / "missing")
    Disk().remove(tmp_path / "missing")


class TestFolderSync:
    class Refusing(Disk):
        """A file system that does not sync folders."""

        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def fsync_folder(self, fd: int) -> None:
            raise OSError(self.number, os.strerror(self.number))

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
    def test_is_refused_with_one_warning(self, tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture) -> None:
        disk = self.Refusing(number)
        with caplog.at_level(logging.WARNING):
            disk.write_file(tmp_path / "a", b"")
            disk.write_file(tmp_path / "b", b"")
        assert len(caplog.records) == 1
        assert "power cut" in caplog.text

    def test_fails(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="Input/output"):
            self.Refusing(errno.EIO).sync_folder(tmp_path)


def test_how_to_sync_is_chosen_by_the_file_system(tmp_path: Path) -> None:
    assert file_system_magic(Path("/proc")) == 0x9FA0
    assert file_system_magic(tmp_path / "missing") == 0
    assert not needs_sync_of_each_file(Path("/proc"))
    assert Disk.for_folder(tmp_path, mode="files").sync_each_file
    assert not Disk.for_folder(tmp_path, mode="files", durable=False).sync_each_file
    assert not Disk.for_folder(tmp_path, mode="fs").sync_each_file


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """An overlay whose lower layer holds `state/tree/0/image` and a copy that a crash left unfinished."""
    if os.geteuid():
        pytest.skip("needs root to mount an overlay")
    lower, upper, work, mount = (tmp_path / name for name in ("lower", "upper", "work", "mount"))
    for folder in (lower / "state" / "tree" / "0", upper, work, mount):
        folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "upper")], check=True)  # the upper layer's own
    (upper / "u").mkdir()
    (upper / "w").mkdir()
    (lower / "state" / "tree" / "0" / "image").write_bytes(b"image")
    options = f"lowerdir={lower},upperdir={upper}/u,workdir={upper}/w"
    try:
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", str(mount)], check=True)
        try:
            yield mount
        finally:
            subprocess.run(["umount", str(mount)], check=True)
    finally:
        subprocess.run(["umount", str(upper)], check=True)


@pytest.mark.root
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_folder_of_a_lower_layer_is_moved(overlay: Path, interrupted: bool) -> None:
    tree = overlay / "state" / "tree"
    with pytest.raises(OSError, match="cross-device"):
        os.rename(tree, overlay / "train")
    if interrupted:
        Disk().merge_folder(tree, copy_of(tree))
    Disk().move_folder(tree, overlay / "train")
    assert (overlay / "train" / "0" / "image").read_bytes() == b"image"
    assert list((overlay / "state").iterdir()) == []
