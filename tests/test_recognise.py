from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from factory import END, WNIDS, images, member, tar, train_tar, val_name, write

from imagenet_unpack.errors import ArchiveError, MissingArchiveError
from imagenet_unpack.sources.discover import discover, find, find_split, near_misses

INNER = tar(images(WNIDS[0], [b"\xff\xd8x"]))
TRAIN = train_tar({WNIDS[0]: INNER})
VAL = tar([(val_name(1), b"x")])
TEST = tar([("ILSVRC2012_test_00000001.JPEG", b"x")])


def one(path: Path) -> tuple[str, tuple[str, ...]]:
    (source,) = find(path)
    assert source.what
    return source.kind, source.splits


def packed(data: bytes, name: str) -> bytes:
    compress: dict[str, Callable[[bytes], bytes]] = {
        "gzip": gzip.compress,
        "xz": lzma.compress,
        "bzip2": bz2.compress,
    }
    return compress[name](data)


class TestTars:
    @pytest.mark.parametrize(
        ("data", "kind", "splits"),
        [
            (TRAIN, "inner-tars", ("train",)),
            (tar([(f"winter21_whole/{WNIDS[0]}.tar", INNER)]), "inner-tars", ("train",)),
            (member(b"x/", b"", b"5") + tar([(f"x/{WNIDS[0]}.tar", INNER)]), "inner-tars", ("train",)),
            (tar([("._a", b"x"), (".DS_Store", b"y"), (f"{WNIDS[0]}.tar", INNER)]), "inner-tars", ("train",)),
            (VAL, "images", ("val",)),
            (tar([(f"./val/{val_name(7)}", b"x")]), "images", ("val",)),
            (TEST, "images", ("test",)),
            (tar([("test/ILSVRC2012_test_00000009.JPEG", b"x")]), "images", ("test",)),
            (tar([(f"{WNIDS[0]}_18_{WNIDS[0]}.JPEG", b"x")]), "stream", ("train",)),
            (tar([(f"ILSVRC2012_val_00000293_{WNIDS[0]}.JPEG", b"x")]), "stream", ("val",)),
            (tar([("ILSVRC/Annotations/CLS-LOC/val/a.xml", b"x")]), "stream", ("train", "val", "test")),
        ],
    )
    def test_by_their_first_members(self, tmp_path: Path, data: bytes, kind: str, splits: tuple[str, ...]) -> None:
        assert one(write(tmp_path / "any name", data)) == (kind, splits)

    @pytest.mark.parametrize("compression", ["gzip", "xz", "bzip2"])
    @pytest.mark.parametrize(("data", "splits"), [(TRAIN, ("train",)), (VAL, ("val",)), (TEST, ("test",))])
    def test_compressed(self, tmp_path: Path, compression: str, data: bytes, splits: tuple[str, ...]) -> None:
        (source,) = find(write(tmp_path / "a", packed(data, compression)))
        assert (source.kind, source.splits, source.compression) == ("stream", splits, compression)
        assert compression in source.what

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (b"", "empty"),
            (b"<!DOCTYPE html><html>", "web page"),
            (b"sorry", "text file"),
            (b"\1\2\3" * 1000, "no valid tar header"),
            (END, "begins with zeros"),
            (member(b".DS_Store") + END, "neither images nor inner tars"),
            (INNER, "single inner tar"),
            (tar([(f"{WNIDS[0]}/{WNIDS[0]}_1.JPEG", b"x")]), "class folders"),
            (tar([("ILSVRC2012_devkit_t12/readme.txt", b"x")]), "development kit"),
            (tar([("holiday.jpg", b"x")]), "not of ImageNet"),
            (gzip.compress(b"just text", mtime=0), "inside is a text file"),
            (gzip.compress(INNER, mtime=0), "single inner tar"),
            (gzip.compress(TRAIN, mtime=0)[:20], "gzip.*damaged"),
        ],
    )
    def test_what_is_refused_says_what_it_is(self, tmp_path: Path, data: bytes, words: str) -> None:
        path = write(tmp_path / "ILSVRC2012_img_train.tar", data)
        with pytest.raises(ArchiveError, match=words) as caught:
            find(path)
        assert str(path) in str(caught.value)

    def test_the_archive_of_task_3(self, tmp_path: Path) -> None:
        with pytest.raises(ArchiveError, match="task 3"):
            find(write(tmp_path / "ILSVRC2012_img_train_t3.tar", TRAIN))
        with pytest.raises(ArchiveError, match="task 3"):
            find(write(tmp_path / "ILSVRC2012_img_train_t3.tar.gz", gzip.compress(TRAIN)))


class TestNamedForASplit:
    def test_the_wrong_one_is_named_with_the_right_option(self, tmp_path: Path) -> None:
        with pytest.raises(ArchiveError, match="--val-archive"):
            find_split(write(tmp_path / "v.tar", VAL), "train")
        with pytest.raises(ArchiveError, match="--train-archive"):
            find_split(write(tmp_path / "t.tar", TRAIN), "val")

    def test_images_of_unknown_names_are_taken_as_validation_images(self, tmp_path: Path) -> None:
        path = write(tmp_path / "v.tar", tar([("img_1.JPEG", b"x")]))
        assert find_split(path, "val").kind == "images"
        with pytest.raises(ArchiveError, match="not of ImageNet"):
            find_split(path, "train")


class TestPieces:
    @pytest.mark.parametrize(
        "endings", [("part-aa", "part-ab"), ("aa", "ab", "ac"), ("001", "002"), ("part1", "part2")]
    )
    def test_are_named_with_the_command_that_joins_them(self, tmp_path: Path, endings: tuple[str, ...]) -> None:
        folder = tmp_path / "with space"
        folder.mkdir()
        whole = folder / "ILSVRC2012_img_train.tar"
        for ending in endings:
            write(folder / f"{whole.name}.{ending}", TRAIN[:700])
        messages = [near_misses(folder, "train")]
        for path in (whole, folder / f"{whole.name}.{endings[0]}", folder / f"{whole.name}.{endings[-1]}"):
            with pytest.raises(ArchiveError) as caught:
                find(path)
            messages.append(str(caught.value))
        for message in messages:
            assert f"{whole.name}.{endings[0]}" in message
            assert "cat '" in message
            assert f"* > '{whole}'" in message

    def test_other_endings_are_no_pieces(self, tmp_path: Path) -> None:
        for name in ("a.tar.gz", "a.tar.xz"):
            assert find(write(tmp_path / name, gzip.compress(TRAIN, mtime=0)))[0].kind == "stream"
        assert find(write(tmp_path / "a.tar.md5", TRAIN))[0].kind == "inner-tars"


def test_a_missing_file_is_told_with_names_like_it(tmp_path: Path) -> None:
    write(tmp_path / "ILSVRC2012_img_train (1).tar", TRAIN)
    with pytest.raises(MissingArchiveError, match=r"\(1\)"):
        find(tmp_path / "ILSVRC2012_img_train.tar")
    assert "(1)" in near_misses(tmp_path, "train")
    assert near_misses(tmp_path, "val") == ""


class TestDiscover:
    def test_usual_names_of_the_splits_asked_for(self, tmp_path: Path) -> None:
        write(tmp_path / "ILSVRC2012_img_train.tar", b"<html>")
        write(tmp_path / "ILSVRC2012_img_val.tar", VAL)
        write(tmp_path / "ILSVRC2012_img_test_v10102019.tar", TEST)
        write(tmp_path / "holiday.tar", VAL)
        found = {source.splits: source.paths[0].name for source in discover(tmp_path, ["val", "test"])}
        assert found == {("val",): "ILSVRC2012_img_val.tar", ("test",): "ILSVRC2012_img_test_v10102019.tar"}
        with pytest.raises(ArchiveError, match="web page"):
            discover(tmp_path, ["train"])

    def test_a_usual_name_must_hold_its_split(self, tmp_path: Path) -> None:
        path = write(tmp_path / "ILSVRC2012_img_val.tar", TRAIN)
        with pytest.raises(ArchiveError, match="--train-archive"):
            discover(tmp_path, ["val"])
        write(path, tar([("img_1.JPEG", b"x")]))
        assert discover(tmp_path, ["val"])[0].kind == "images"

    def test_a_folder_of_inner_tars(self, tmp_path: Path) -> None:
        folder = tmp_path / "ILSVRC2012_img_train"
        folder.mkdir()
        write(folder / f"{WNIDS[0]}.tar", INNER)
        for place in (tmp_path, folder):
            (source,) = discover(place)
            assert (source.kind, source.paths, source.splits) == ("tar-folder", (folder,), ("train",))
        assert find(folder)[0].kind == "tar-folder"

    def test_pieces_of_hugging_face_make_one_source(self, tmp_path: Path) -> None:
        data = tmp_path / "data"
        data.mkdir()
        for number in range(5):
            name = f"{WNIDS[number]}_1_{WNIDS[number]}.JPEG"
            write(data / f"train_images_{number}.tar.gz", gzip.compress(tar([(name, b"x")])))
        for name in (
            "train-00000-of-00002.parquet",
            "train-00001-of-00002.parquet",
            "validation-00000-of-00001.parquet",
        ):
            write(tmp_path / name, b"PAR1" + bytes(100))
        found = {(source.kind, source.splits): len(source.paths) for source in discover(tmp_path)}
        assert found == {("stream", ("train",)): 5, ("parquet", ("train",)): 2, ("parquet", ("val",)): 1}

    def test_imagenet_21k_where_any_wnids_are_taken(self, tmp_path: Path) -> None:
        write(tmp_path / "winter21_whole.tar", TRAIN)
        assert discover(tmp_path) == ()
        assert discover(tmp_path, ["train"], any_wnids=True)[0].kind == "inner-tars"

    def test_an_empty_folder_named_as_a_source(self, tmp_path: Path) -> None:
        with pytest.raises(ArchiveError, match="contains no archive"):
            find(tmp_path)


def test_a_zip(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a", b"x")
    assert find(write(tmp_path / "a.zip", out.getvalue()))[0].kind == "zip"
