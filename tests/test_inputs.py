from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from factory import WNIDS, header, images, tar, train_tar, val_index, val_name, write

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.errors import ArchiveError, MissingArchiveError, UsageError
from imagenet_unpack.model import SplitPlan
from imagenet_unpack.planning.inputs import Inputs, Request, find_inputs
from imagenet_unpack.sources.tar import WholeTar

INNER = tar(images(WNIDS[0], [b"\xff\xd8x"]))
TRAIN = train_tar({WNIDS[0]: INNER})
VAL = tar([(val_name(1), b"x")])
TEST = tar([(f"test/ILSVRC2012_test_{number:08d}.JPEG", b"x") for number in range(1, 4)])


def inputs(base: Path, **fields: Any) -> Inputs:
    values: dict[str, Any] = {"base_dir": base, "archives": {}, **fields}
    return find_inputs(Request(**values))


def plans(found: Inputs) -> dict[str, SplitPlan]:
    return {split: planner(found.classes) for split, planner in found.planners.items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write(tmp_path / "ILSVRC2012_img_train.tar", TRAIN)
    write(tmp_path / "ILSVRC2012_img_val.tar", VAL)
    write(tmp_path / "ILSVRC2012_img_test_v10102019.tar", TEST)
    return tmp_path


def test_train_and_val_unless_asked_otherwise(base: Path) -> None:
    found = plans(inputs(base))
    assert set(found) == {"train", "val"}
    assert "inner tars" in found["train"].source
    assert set(plans(inputs(base, splits=("val", "test")))) == {"val", "test"}
    assert set(plans(inputs(base, sources=(base / "ILSVRC2012_img_test_v10102019.tar",)))) == {"test"}


def test_a_split_that_is_left_out_is_told_with_names_like_its_own(base: Path) -> None:
    (base / "ILSVRC2012_img_val.tar").rename(base / "ILSVRC2012_img_val (1).tar")
    found = inputs(base)
    assert "(1)" in found.left_out["val"]
    assert any("val is left out" in note and "(1)" in note for note in plans(found)["train"].notes)
    with pytest.raises(MissingArchiveError, match=r"\(1\)"):
        plans(inputs(base, splits=("val",)))


def test_no_archive_at_all(tmp_path: Path) -> None:
    with pytest.raises(MissingArchiveError, match="no ImageNet archives"):
        inputs(tmp_path)


def test_two_sources_for_one_split_are_refused_by_name(base: Path) -> None:
    other = write(base / "other.tar", TRAIN)
    with pytest.raises(ArchiveError, match=r"two sources for train.*other\.tar"):
        inputs(base, sources=(base / "ILSVRC2012_img_train.tar", other))
    with pytest.raises(ArchiveError, match="two sources for train"):
        inputs(base, sources=(other,), archives={"train": base / "ILSVRC2012_img_train.tar"})
    assert set(plans(inputs(base, archives={"train": other}))) == {"train", "val"}


def test_a_source_is_named_once(base: Path) -> None:
    path = base / "ILSVRC2012_img_train.tar"
    (base / "link.tar").symlink_to(path)
    for other in (path, base, base / "link.tar"):
        with pytest.raises(UsageError, match="given twice"):
            inputs(base, sources=(path, other))


def test_sources_take_the_place_of_the_base_folder(base: Path, tmp_path: Path) -> None:
    found = inputs(base, sources=(write(base / "v.tar", VAL),))
    assert set(plans(found)) == {"val"}
    assert set(plans(inputs(Path("/none"), sources=(base,)))) == {"train", "val"}


def test_an_archive_of_another_split_stands_in_nobody_s_way(base: Path) -> None:
    write(base / "ILSVRC2012_img_val.tar", b"<html>")
    assert set(plans(inputs(base, splits=("train",)))) == {"train"}
    with pytest.raises(ArchiveError, match="web page"):
        inputs(base)


class TestTestSplit:
    def test_images_lie_directly_in_its_folder(self, base: Path) -> None:
        plan = plans(inputs(base, splits=("test",)))["test"]
        assert [(ref.index, ref.wnid, ref.folder) for ref in plan.classes] == [(-1, "-", "")]
        assert (plan.images, plan.class_count) == (3, 0)
        assert any("100,000" in note for note in plan.notes)

    def test_the_layout_makes_no_difference(self, base: Path) -> None:
        one, other = (plans(inputs(base, splits=("test",), layout=layout))["test"] for layout in ("index", "wnid"))
        assert one == other


class TestOfficialSize:
    """A download into a preallocated file: the published size, few of the members, zeros behind them."""

    @pytest.mark.parametrize(
        ("split", "published", "words"),
        [
            ("train", ilsvrc2012.TRAIN_ARCHIVE, "1 of its 1,000 inner tars"),
            ("val", ilsvrc2012.VAL_ARCHIVE, "1 of its 50,000 images"),
        ],
    )
    def test_without_the_published_members_is_refused(
        self, base: Path, split: str, published: ilsvrc2012.Published, words: str
    ) -> None:
        os.truncate(base / published.name, published.size_bytes or 0)
        with pytest.raises(ArchiveError, match=words):
            plans(inputs(base, splits=(split,)))
        plan = plans(inputs(base, splits=(split,), verify="none"))[split]
        assert not plan.archive.official
        assert any("--verify-archives none" in note for note in plan.notes)
        assert any("zeros follow" in note for note in plan.notes)


class TestTask3:
    """`ILSVRC2012_img_train_t3.tar` under another name."""

    dogs = sorted(ilsvrc2012.DOGS)[:120]

    def write(self, folder: Path, sizes: list[int]) -> tuple[Path, Path]:
        """Write inner tars of nothing but holes, into a tar and into a folder."""
        path, inner = folder / "dogs.tar", folder / "dogs"
        inner.mkdir()
        with open(path, "wb") as file:
            for wnid, size in zip(self.dogs, sizes, strict=True):
                file.write(header(f"{wnid}.tar".encode(), size=b"%011o\0" % size))
                file.seek(-(-size // 512) * 512, os.SEEK_CUR)
                os.truncate(write(inner / f"{wnid}.tar", b""), size)
            file.write(bytes(1024))
        return path, inner

    def test_is_recognised_by_its_classes_and_size(self, tmp_path: Path) -> None:
        for path in self.write(tmp_path, [728_000_000 // 120] * 120):
            with pytest.raises(ArchiveError, match="task 3"):
                plans(inputs(tmp_path, sources=(path,)))
            assert len(plans(inputs(tmp_path, sources=(path,), verify="none"))["train"].shards) == 120

    def test_the_dogs_of_the_train_archive_are_a_subset_like_others(self, tmp_path: Path) -> None:
        sizes = [ilsvrc2012.train_inner_tar_bytes()[WNIDS.index(wnid)] for wnid in self.dogs]
        for path in self.write(tmp_path, sizes):
            assert len(plans(inputs(tmp_path, sources=(path,)))["train"].shards) == 120


class TestTarFolder:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "ILSVRC2012_img_train"
        folder.mkdir()
        for wnid in WNIDS[:3]:
            write(folder / f"{wnid}.tar", tar(images(wnid, [b"x" * 50, b"y"])))
        return folder

    def test_each_file_is_a_shard_and_missing_ones_are_named(self, folder: Path) -> None:
        write(folder / "README", b"x")
        write(folder / "._n01440764.tar", b"x")
        plan = plans(inputs(folder.parent))["train"]
        assert {shard.archive.path for shard in plan.shards} == {str(folder / f"{wnid}.tar") for wnid in WNIDS[:3]}
        assert all((shard.offset, shard.end) == (0, shard.archive.size_bytes) for shard in plan.shards)
        assert len(plan.files) == 3
        assert any("997 of 1,000" in note and WNIDS[3] in note for note in plan.notes)
        assert any("README" in note and "._" not in note for note in plan.notes)

    def test_a_compressed_one_is_not_taken_for_missing(self, folder: Path) -> None:
        write(folder / f"{WNIDS[3]}.tar.gz", b"x")
        with pytest.raises(ArchiveError, match=rf"{WNIDS[3]}\.tar\.gz.*decompress"):
            plans(inputs(folder.parent))
        write(folder / f"{WNIDS[3]}.tar", tar(images(WNIDS[3], [b"x"])))
        assert len(plans(inputs(folder.parent))["train"].shards) == 4

    def test_a_class_that_is_asked_for_must_be_there(self, folder: Path) -> None:
        assert len(plans(inputs(folder.parent, classes="0-2"))["train"].shards) == 3
        with pytest.raises(ArchiveError, match=WNIDS[3]):
            plans(inputs(folder.parent, classes="0-3"))

    def test_its_identity_follows_every_file(self, folder: Path) -> None:
        before = plans(inputs(folder.parent))["train"].archive
        os.utime(folder / f"{WNIDS[1]}.tar", (1, 1))
        touched = plans(inputs(folder.parent))["train"].archive
        assert (touched.headers, touched.size_bytes) == (before.headers, before.size_bytes)
        assert touched.mtime_ns != before.mtime_ns
        write(folder / f"{WNIDS[1]}.tar", tar(images(WNIDS[2], [b"x" * 50, b"y"])))
        assert plans(inputs(folder.parent))["train"].archive.headers != before.headers

    def test_a_file_of_the_published_size_must_have_the_published_images(self, folder: Path) -> None:
        os.truncate(folder / f"{WNIDS[0]}.tar", ilsvrc2012.train_inner_tar_bytes()[0])
        for verify in ("size", "none"):
            plan = plans(inputs(folder.parent, verify=verify))["train"]
            payloads = {shard.id: shard.payload for shard in plan.shards}
            assert payloads[WNIDS[0]] == WholeTar(images=1300, demand_images=verify == "size")
            assert payloads[WNIDS[1]] == WholeTar(demand_images=verify == "size")

    def test_an_empty_file_is_named(self, folder: Path) -> None:
        write(folder / f"{WNIDS[1]}.tar", b"")
        with pytest.raises(ArchiveError, match=WNIDS[1]):
            plans(inputs(folder.parent))


class TestAnyWnids:
    def test_a_leading_folder_and_wnids_of_imagenet_21k(self, tmp_path: Path) -> None:
        inner = tar(images("n00004475", [b"x"]))
        path = write(tmp_path / "winter21_whole.tar", tar([("winter21_whole/n00004475.tar", inner)]))
        plan = plans(inputs(tmp_path, any_wnids=True, layout="wnid"))["train"]
        assert [ref.folder for ref in plan.classes] == ["n00004475"]
        with pytest.raises(ArchiveError, match="--any-wnids"):
            plans(inputs(tmp_path, archives={"train": path}))

    def test_needs_the_layout_by_wnid_and_every_class(self, tmp_path: Path) -> None:
        for fields in ({"layout": "index"}, {"layout": "wnid", "splits": ("val",)}, {"layout": "wnid", "classes": "0"}):
            with pytest.raises(UsageError):
                inputs(tmp_path, any_wnids=True, **fields)


def test_labels_that_differ_from_the_published_ones_are_told_whatever_the_archive_s_size(base: Path) -> None:
    labels = write(base / "labels.txt", f"{val_name(1)} {(val_index(1) + 7) % 1000}\n".encode())
    plan = plans(inputs(base, splits=("val",), val_labels=labels))["val"]
    assert any("not the published" in note for note in plan.notes)
