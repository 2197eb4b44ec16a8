from __future__ import annotations

from pathlib import Path

import pytest
from factory import WNIDS, images, tar, train_plan, train_tar, write

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.planning.flat import plan_test
from imagenet_unpack.planning.official import compare, lost_classes, verify_digest

SIZES = ilsvrc2012.train_inner_tar_bytes()


class TestCompare:
    def test_the_official_archive(self) -> None:
        size, members = ilsvrc2012.VAL_ARCHIVE.size_bytes or 0, ilsvrc2012.VAL_ARCHIVE.members
        assert compare(Path("v"), size, ilsvrc2012.VAL_ARCHIVE, members, verify="size") == (True, ())
        assert compare(Path("v"), size, ilsvrc2012.VAL_ARCHIVE, members, verify="none") == (False, ())

    def test_another_archive_is_noted(self) -> None:
        official, (note,) = compare(Path("v"), 5, ilsvrc2012.VAL_ARCHIVE, 50_000, verify="digest")
        assert not official
        assert "custom archive" in note


class TestLostClasses:
    def beginning(self, count: int) -> list[tuple[str, int]]:
        return [(f"{wnid}.tar", size) for wnid, size in zip(WNIDS[:count], SIZES, strict=False)]

    def test_are_told_of_the_official_archive(self) -> None:
        size = sum(SIZES[:5]) + 6 * 512
        assert f"995 classes, from {WNIDS[5]}" in lost_classes(self.beginning(5), size)
        assert f"995 classes, from {WNIDS[5]}" in lost_classes(self.beginning(6), size + 1000)

    def test_are_not_told_of_another_one(self) -> None:
        size = sum(SIZES[:5])
        assert lost_classes([], size) == ""
        assert lost_classes([(f"{WNIDS[0]}.tar", 10_240)], size) == ""
        assert lost_classes([("val.tar", SIZES[0])], size) == ""
        assert lost_classes(self.beginning(5)[1:], size) == ""


class TestDigest:
    def test_progress_counts_every_byte(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.tar", tar([("ILSVRC2012_test_00000001.JPEG", b"x" * 100_000)]))
        read: list[int] = []
        with pytest.raises(ArchiveError, match="not the published"):
            verify_digest(plan_test(path), read.append)
        assert sum(read) == path.stat().st_size

    def test_an_archive_of_another_size_is_not_read(self, tmp_path: Path) -> None:
        plan = train_plan(write(tmp_path / "t.tar", train_tar({WNIDS[0]: tar(images(WNIDS[0], [b"x"]))})))
        with pytest.raises(ArchiveError, match="not the published"):
            verify_digest(plan, lambda _: pytest.fail("it was read"))
