from __future__ import annotations

import errno
import json
import os
import stat
import threading
from pathlib import Path

import pytest

from imagenet_unpack.errors import TargetError
from imagenet_unpack.model import Part
from imagenet_unpack.targets.claim import claim_target, claimed, mounted_kind, try_file_system
from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.targets.locks import LockFile
from imagenet_unpack.targets.paths import STATE_FOLDER, SplitPaths
from imagenet_unpack.targets.split import Split


class TestFolder:
    def test_is_made_and_recognised(self, tmp_path: Path) -> None:
        target = tmp_path / "deep" / "target"
        claim_target(target)
        assert json.loads((target / STATE_FOLDER / "record.json").read_text()) == {
            "program": "imagenet_unpack",
            "schema": 1,
        }
        claim_target(target)

    def test_many_at_once_make_one(self, tmp_path: Path) -> None:
        faults: list[Exception] = []

        def claim() -> None:
            try:
                claim_target(tmp_path / "t")
            except Exception as error:  # noqa: BLE001 - shown by the assertion
                faults.append(error)

        threads = [threading.Thread(target=claim) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert faults == []

    def test_an_interrupted_start_goes_on(self, tmp_path: Path) -> None:
        root = tmp_path / STATE_FOLDER
        root.mkdir()
        (root / "record.json.0123.tmp").write_text("{")
        (root / "locks").mkdir()  # as version 0.1.0 made it first
        claim_target(tmp_path)
        assert (root / "record.json").exists()

    @pytest.mark.parametrize("kind", ["foreign", "link", "dangling", "file"])
    def test_of_something_else_is_not_touched(self, tmp_path: Path, kind: str) -> None:
        root, elsewhere = tmp_path / "t" / STATE_FOLDER, tmp_path / "elsewhere"
        root.parent.mkdir()
        if kind == "foreign":
            root.mkdir()
            (root / "mine").touch()
        elif kind == "link":
            elsewhere.mkdir()
            root.symlink_to(elsewhere)
        elif kind == "dangling":
            root.symlink_to(elsewhere)
        else:
            root.write_text("mine")
        with pytest.raises(TargetError, match=STATE_FOLDER):
            claim_target(root.parent)
        assert not elsewhere.exists() or list(elsewhere.iterdir()) == []
        assert kind != "foreign" or os.listdir(root) == ["mine"]

    @pytest.mark.parametrize(
        "data", [b"{}", b'{"program": "other", "schema": 1}', b'{"program": "imagenet_unpack", "schema": 2}']
    )
    def test_with_a_damaged_or_newer_record(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / STATE_FOLDER).mkdir()
        record = tmp_path / STATE_FOLDER / "record.json"
        record.write_bytes(data)
        with pytest.raises(TargetError, match=str(record)):
            claim_target(tmp_path)
        assert record.read_bytes() == data

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to any group")
    def test_has_the_group_of_a_shared_target(self, tmp_path: Path) -> None:
        target = tmp_path / "t"
        target.mkdir()
        os.chown(target, -1, 7777)
        target.chmod(0o775)
        claim_target(target)
        for path in (target / STATE_FOLDER, target / STATE_FOLDER / "record.json"):
            assert path.stat().st_gid == 7777
        assert (target / STATE_FOLDER).stat().st_mode & stat.S_ISGID

    def test_name_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(TargetError, match="too long"):
            claim_target(tmp_path / ("x" * 300))


class TestFileSystem:
    def test_leaves_nothing_behind(self, tmp_path: Path) -> None:
        claim_target(tmp_path)
        before = sorted(os.listdir(tmp_path / STATE_FOLDER))
        try_file_system(tmp_path, Disk())
        assert sorted(os.listdir(tmp_path / STATE_FOLDER)) == before

    def test_says_what_it_could_not_do(self, tmp_path: Path) -> None:
        class NoRename(Disk):
            def rename(self, source: Path, destination: Path) -> None:
                if source.is_dir():
                    raise OSError(errno.EPERM, "Operation not permitted")
                super().rename(source, destination)

        claim_target(tmp_path)
        with pytest.raises(TargetError, match="rename a folder"):
            try_file_system(tmp_path, NoRename())
        assert not list((tmp_path / STATE_FOLDER).glob("trial*"))

    def test_object_stores_are_refused_by_name(self, tmp_path: Path) -> None:
        device = tmp_path.stat().st_dev
        line = f"36 35 {os.major(device)}:{os.minor(device)} / /mnt rw shared:1 - fuse.s3fs s3fs rw\n"
        (tmp_path / "mountinfo").write_text("25 1 0:5 / /proc rw - proc proc rw\n" + line)
        assert mounted_kind(tmp_path, tmp_path / "mountinfo") == "fuse.s3fs"
        claim_target(tmp_path)
        with pytest.raises(TargetError, match="object store"):
            try_file_system(tmp_path, Disk(), mountinfo=tmp_path / "mountinfo")

    def test_what_cannot_be_told_is_no_obstacle(self, tmp_path: Path) -> None:
        assert mounted_kind(tmp_path, tmp_path / "missing") == ""


class TestOldVersion:
    def test_its_locks_are_respected(self, tmp_path: Path) -> None:
        claim_target(tmp_path)
        paths = SplitPaths(tmp_path, "train")
        paths.legacy_locks.mkdir()
        with LockFile(paths.legacy_locks / "train.lock") as lock:
            lock.take()
            with pytest.raises(TargetError, match=r"0\.1\.0"), claimed(Split(paths, Disk()), Part()):
                pass
        with claimed(Split(paths, Disk()), Part()):
            pass
