from __future__ import annotations

import gzip
import os
from dataclasses import replace
from pathlib import Path

import factory
import pytest

from imagenet_unpack.dataset.labels import ValLabels, load_val_labels
from imagenet_unpack.errors import ArchiveError, LabelError
from imagenet_unpack.model import SplitName, StreamPlan, StreamSource, class_refs
from imagenet_unpack.planning.streams import Placer, open_stream, plan_streams
from imagenet_unpack.sources.tarindex import EndOfArchive, Entry, iter_entries

FIRST, SECOND = factory.WNIDS[:2]
REFS = class_refs(factory.WNIDS, "index")
LABELS = load_val_labels(None, factory.WNIDS)
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")


def source(tmp_path: Path, names: list[str], *, packed: bool = True) -> StreamSource:
    data = factory.tar([(name, b"" if name.endswith("/") else b"abc") for name in names])
    return open_stream(factory.write(tmp_path / "a.tar.gz", gzip.compress(data) if packed else data))


def entries(names: list[str]) -> list[Entry]:
    data = factory.tar([(name, b"abc") for name in names])
    found = iter_entries(lambda offset, size: data[offset : offset + size], 0, len(data), "a.tar")
    return [entry for entry in found if not isinstance(entry, EndOfArchive)]


def placed(
    tmp_path: Path,
    names: list[str],
    *,
    splits: tuple[SplitName, ...] = SPLITS,
    labels: ValLabels = LABELS,
    labels_given: bool = False,
) -> list[tuple[str, int, str] | None]:
    plan = StreamPlan(
        sources=(), refs=REFS, labels=labels.by_name, labels_source=labels.source, labels_given=labels_given
    )
    placer = Placer(source(tmp_path, names), dict.fromkeys(splits, plan))
    places = [placer(entry) for entry in entries(names)]
    return [None if place is None else (place.split, place.ref.index, place.name) for place in places]


def test_a_tar_of_inner_tars_below_a_folder_is_train(tmp_path: Path) -> None:
    names = [f"winter21_whole/{FIRST}.tar", f"winter21_whole/{SECOND}.tar"]
    found = source(tmp_path, names)
    assert (found.shape, found.splits, found.compression) == ("nested", ("train",), "gzip")
    assert placed(tmp_path, names) == [("train", 0, ""), ("train", 1, "")]


def test_names_of_hugging_face_lose_their_labels(tmp_path: Path) -> None:
    names = [f"{FIRST}_18_{FIRST}.JPEG", f"{SECOND}_7_{SECOND}.JPEG"]
    assert source(tmp_path, names).splits == ("train",)
    assert placed(tmp_path, names) == [("train", 0, f"{FIRST}_18.JPEG"), ("train", 1, f"{SECOND}_7.JPEG")]


def test_validation_images_go_by_the_label_in_their_name_else_by_the_table(tmp_path: Path) -> None:
    wnid = factory.WNIDS[factory.val_index(293)]
    names = [f"ILSVRC2012_val_00000293_{wnid}.JPEG", factory.val_name(1)]
    assert source(tmp_path, names).splits == ("val",)
    assert placed(tmp_path, names) == [
        ("val", factory.val_index(293), factory.val_name(293)),
        ("val", factory.val_index(1), factory.val_name(1)),
    ]


def test_labels_of_the_archive_must_not_contradict_those_of_a_given_file(tmp_path: Path) -> None:
    names = [f"ILSVRC2012_val_00000001_{FIRST}.JPEG"]
    assert factory.val_index(1) != 0
    assert placed(tmp_path, names) == [("val", 0, factory.val_name(1))]
    with pytest.raises(LabelError, match=FIRST):
        placed(tmp_path, names, labels_given=True)


def test_a_validation_image_without_a_label_is_a_fault(tmp_path: Path) -> None:
    names = [factory.val_name(1)]
    with pytest.raises(LabelError, match="--val-labels"):
        placed(tmp_path, names, labels=ValLabels(by_name={}, source="labels.txt"))
    assert placed(tmp_path, names, labels=ValLabels(by_name={}, source="x"), splits=("train",)) == [None]


@pytest.mark.parametrize("lead", ["", "./", "imagenet/"])
def test_kaggles_folders_hold_three_splits_and_more(tmp_path: Path, lead: str) -> None:
    names = [
        f"{lead}ILSVRC/Annotations/CLS-LOC/train/{FIRST}/{FIRST}_18.xml",
        f"{lead}ILSVRC/Data/CLS-LOC/train/{SECOND}/{SECOND}_18.JPEG",
        f"{lead}ILSVRC/Data/CLS-LOC/val/{factory.val_name(1)}",
        f"{lead}ILSVRC/Data/CLS-LOC/val/._{factory.val_name(1)}",
        f"{lead}ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG",
        f"{lead}LOC_val_solution.csv",
    ]
    found = source(tmp_path, names)
    assert (found.shape, found.splits) == ("kaggle", SPLITS)
    assert placed(tmp_path, names) == [
        None,
        ("train", 1, f"{SECOND}_18.JPEG"),
        ("val", factory.val_index(1), factory.val_name(1)),
        None,
        ("test", -1, "ILSVRC2012_test_00000001.JPEG"),
        None,
    ]


@pytest.mark.parametrize(
    "name",
    ["ILSVRC/Data/CLS-LOC/train/n99999999/n99999999_1.JPEG", "other/file.txt", "ILSVRC/Data/CLS-LOC/val/a\nb.JPEG"],
)
def test_what_does_not_belong_into_kaggles_archive_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArchiveError):
        placed(tmp_path, ["ILSVRC/LOC.txt", name])


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"<html><body>Please log in</body></html>\n", "web page"),
        (factory.tar(factory.images(FIRST, [b"abc"])), "inner tar"),
        (factory.tar([("ILSVRC2012_devkit_t12/readme.txt", b"abc")]), "development kit"),
        (bytes(20_000), "no image"),
        (b"", "holds nothing"),
    ],
    ids=["page", "inner", "devkit", "zeros", "empty"],
)
def test_a_gzip_file_of_something_else_is_called_that(tmp_path: Path, data: bytes, word: str) -> None:
    with pytest.raises(ArchiveError, match=word):
        open_stream(factory.write(tmp_path / "a.gz", gzip.compress(data)))


def test_a_pipe_is_recognised_and_keeps_what_was_read() -> None:
    data = gzip.compress(factory.tar([(f"{FIRST}_18_{FIRST}.JPEG", os.urandom(3000))]))
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    found = open_stream(Path(f"/dev/fd/{reader}"))
    os.close(reader)
    assert found.head == data
    assert found.pipe_fd is not None
    assert os.read(found.pipe_fd, 1) == b""
    os.close(found.pipe_fd)
    assert found.archive.size_bytes == 0


def test_the_identity_of_a_file_is_its_size_its_time_and_its_beginning(tmp_path: Path) -> None:
    first = source(tmp_path, [f"{FIRST}_18_{FIRST}.JPEG"]).archive
    again = source(tmp_path, [f"{FIRST}_19_{FIRST}.JPEG"]).archive
    assert first.headers != again.headers
    assert first.size_bytes > 0


def test_a_plan_estimates_and_says_that_it_does_not_know(tmp_path: Path) -> None:
    found = source(tmp_path, [f"{FIRST}_18_{FIRST}.JPEG"])
    plan = plan_streams("train", [found], REFS, (3, 5), "index", None)
    assert not plan.images_exact
    assert plan.shards == ()
    assert [ref.index for ref in plan.classes] == [3, 5]
    assert "not known" in plan.notes[0]
    assert plan.stream is not None
    assert plan.stream.sources == (found,)


def test_a_missing_piece_of_hugging_faces_train_files_is_named(tmp_path: Path) -> None:
    data = gzip.compress(factory.tar([(f"{FIRST}_18_{FIRST}.JPEG", b"abc")]))
    found = [open_stream(factory.write(tmp_path / f"train_images_{number}.tar.gz", data)) for number in (0, 2)]
    with pytest.raises(ArchiveError, match=r"train_images_1\.tar\.gz"):
        plan_streams("train", found, REFS, None, "index", None)
    found.append(open_stream(factory.write(tmp_path / "train_images_1.tar.gz", data)))
    plan = plan_streams("train", found, REFS, None, "index", None)
    assert "train_images_3.tar.gz" in plan.notes[1]
    large = [replace(each, archive=replace(each.archive, size_bytes=29 << 30)) for each in found]
    with pytest.raises(ArchiveError, match=r"train_images_3\.tar\.gz"):
        plan_streams("train", large, REFS, None, "index", None)


def test_pieces_under_other_names_are_all_that_is_wanted(tmp_path: Path) -> None:
    data = gzip.compress(factory.tar([(f"{FIRST}_18_{FIRST}.JPEG", b"abc")]))
    found = open_stream(factory.write(tmp_path / "some.tar.gz", data))
    large = replace(found, archive=replace(found.archive, size_bytes=29 << 30))
    assert len(plan_streams("train", [large], REFS, None, "index", None).notes) == 1


def test_a_label_that_contradicts_the_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=f"labelled {SECOND}, but is of {FIRST}"):
        placed(tmp_path, [f"{FIRST}_18_{SECOND}.JPEG"])


def test_other_wnids_are_refused_with_the_option_that_takes_them(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="--any-wnids"):
        placed(tmp_path, ["n00004475.tar"])


@pytest.mark.parametrize("name", [factory.val_name(1), "ILSVRC2012_test_00000001.JPEG"])
def test_a_member_of_another_split_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArchiveError, match=r"is of the (val|test) split"):
        placed(tmp_path, [f"{FIRST}_18_{FIRST}.JPEG", name])
