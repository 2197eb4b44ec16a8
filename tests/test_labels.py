from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from factory import WNIDS, val_index, val_name, write

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.dataset.labels import compare_with_builtin, load_val_labels
from imagenet_unpack.errors import LabelError

TABLE = ilsvrc2012.val_class_indices()
EXPECTED = {val_name(number): index for number, index in enumerate(TABLE, 1)}
# Any one-to-one renaming of the classes is as good as the devkit's.
DEVKIT = [str((index * 7 + 3) % 1000 + 1) for index in TABLE]


def lines(kind: str, images: int = 300) -> list[str]:
    """A file of this kind; those without names always list all images."""
    labels = dict(islice(EXPECTED.items(), images))
    stems = {name.removesuffix(".JPEG"): index for name, index in labels.items()}
    return {
        "name and wnid": [f"{name} {WNIDS[index]}" for name, index in labels.items()],
        "name and index": [f"{name} {index}" for name, index in labels.items()],
        "tabs": [f"{name}\t{WNIDS[index]}" for name, index in labels.items()],
        "wnids": [WNIDS[index] for index in TABLE],
        "devkit": DEVKIT,
        "kaggle": [
            "ImageId,PredictionString",
            *(f"{stem},{WNIDS[index]} 85 1 499 272 " for stem, index in stems.items()),
        ],
        "kaggle without header": [f"{stem},{WNIDS[index]} 85 1 499 272 4 5 6 7" for stem, index in stems.items()],
        "header": ["filename label", *(f"{name} {index}" for name, index in labels.items())],
        "comment": ["# of ILSVRC2012", *(f"{name} {index}" for name, index in labels.items())],
        "name,wnid": [f"{name},{WNIDS[index]}" for name, index in labels.items()],
        "quoted": ["image,wnid", *(f'"{name}","{WNIDS[index]}"' for name, index in labels.items())],
        "stem,wnid": [f"{stem},{WNIDS[index]}" for stem, index in stems.items()],
        "stem index": [f"{stem} {index}" for stem, index in stems.items()],
        "jpeg": [f"{stem}.jpeg {WNIDS[index]}" for stem, index in stems.items()],
        "JPG": [f"{stem}.JPG, {index}" for stem, index in stems.items()],
        "below val": [f"val/{name} {index}" for name, index in labels.items()],
        "below val.zip@": [f"val.zip@/{name}\t{index}" for name, index in labels.items()],
        "below the wnid": [f"{WNIDS[index]}/{name} {index}" for name, index in labels.items()],
        "wnid/name": [f"val/{WNIDS[index]}/{name}" for name, index in labels.items()],
    }[kind]


KINDS = [
    "name and wnid", "name and index", "tabs", "wnids", "devkit", "kaggle", "kaggle without header", "header",
    "comment", "name,wnid", "quoted", "stem,wnid", "stem index", "jpeg", "JPG", "below val", "below val.zip@",
    "below the wnid", "wnid/name",
]  # fmt: skip


@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_known_format(tmp_path: Path, kind: str, ending: str) -> None:
    text = "\ufeff" + ending.join(lines(kind)) + ending * 3
    path = write(tmp_path / "labels", text.encode())
    labelled = EXPECTED.items() if kind in ("wnids", "devkit") else islice(EXPECTED.items(), 300)
    assert load_val_labels(path, WNIDS).by_name == dict(labelled)


def test_the_built_in_table() -> None:
    assert load_val_labels(None, WNIDS).by_name == EXPECTED


@pytest.mark.parametrize(
    ("kind", "number", "replacement", "words"),
    [
        ("name and wnid", 3, "ILSVRC2012_val_00000003.JPEG n00000001", "line 3.*n00000001"),
        ("name and wnid", 3, "ILSVRC2012_val_00000002.JPEG n01440764", "line 3.*second label"),
        ("name and wnid", 5, "???", r"line 5.*\?\?\?"),
        ("name and index", 2, "ILSVRC2012_val_00000002.JPEG 1000", "line 2.*1000"),
        ("wnids", 7, "n00000001", "line 7.*n00000001"),
        ("kaggle", 4, "ILSVRC2012_val_00000003,", "line 4"),
        ("devkit", 9, "5000", "line|one class"),
        ("below the wnid", 2, f"n01440764/{val_name(2)} {val_index(2)}", "line 2.*another class"),
        ("wnids", 4, "", "line 4"),
        ("jpeg", 3, f"{val_name(2)} n01440764", "line 3.*second label"),
        ("devkit", 50_000, DEVKIT[0], "line 50000"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, kind: str, number: int, replacement: str, words: str) -> None:
    text = lines(kind)
    text[number - 1] = replacement
    path = write(tmp_path / "labels", "\n".join(text).encode())
    with pytest.raises(LabelError, match=words) as caught:
        load_val_labels(path, WNIDS)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\n\n", b"hello world\n", b"\xff\xfe", b"1\n2\n3\n", b"n01440764\n" * 50_001])
def test_what_is_no_label_file(tmp_path: Path, data: bytes) -> None:
    path = write(tmp_path / "labels", data)
    with pytest.raises(LabelError, match=str(path)):
        load_val_labels(path, WNIDS)


def test_utf_16(tmp_path: Path) -> None:
    path = write(tmp_path / "labels", "\r\n".join(lines("name and index", 9)).encode("utf-16"))
    assert load_val_labels(path, WNIDS).by_name == dict(islice(EXPECTED.items(), 9))


def test_names_are_found_as_they_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "labels", b"ILSVRC2012_val_00000001.jpeg 5\nILSVRC2012_val_00000002 6\nmy image.png 7\n")
    found = load_val_labels(path, WNIDS).by_name
    assert found["ILSVRC2012_val_00000001.jpeg"] == found["ILSVRC2012_val_00000001.JPEG"] == 5
    assert found["ILSVRC2012_val_00000002.JPG"] == found["ILSVRC2012_val_00000002.JPEG"] == 6
    assert found["my image.png"] == 7
    assert not [name for name in ("ILSVRC2012_val_00000001.JPG", "my image.jpg", "other") if name in found]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("#!/bin/bash\n# moves the images\nmkdir -p n01440764\n", "shell script"),
        ("mkdir -p n01440764\nmv ILSVRC2012_val_00000293.JPEG n01440764/\n", "shell script"),
        ("\n# moves\nmv ILSVRC2012_val_00000293.JPEG n01440764/\n", "shell script"),
        ("".join(f"ILSVRC2012_val_{number:08d} {number}\n" for number in range(1, 50_001)), "list of the images"),
        ("".join(f"ILSVRC2012_val_{number:08d} {number}\n" for number in range(1, 31)), "list of the images"),
        ("\x1f\x8b\x08", "gzip"),
        ("PK\x03\x04", "zip"),
    ],
)
def test_what_is_given_by_mistake_is_called_what_it_is(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(LabelError, match=words):
        load_val_labels(write(tmp_path / "labels", text.encode("latin-1")), WNIDS)


@pytest.mark.parametrize(
    ("rename", "words"), [(lambda k: k + 1, "count from 1"), (lambda k: (k * 7 + 13) % 1000, "another order")]
)
def test_labels_of_another_order_are_a_warning_that_says_so(
    tmp_path: Path, rename: Callable[[int], int], words: str
) -> None:
    labels = [(name, rename(index)) for name, index in list(EXPECTED.items())[:300] if index != 999]
    path = write(tmp_path / "labels", "".join(f"{name} {index}\n" for name, index in labels).encode())
    (note,) = compare_with_builtin(load_val_labels(path, WNIDS))
    assert words in note


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="none"):
        load_val_labels(tmp_path / "none", WNIDS)


def test_a_difference_from_the_built_in_table_is_a_warning(tmp_path: Path) -> None:
    text = lines("name and wnid", len(TABLE))
    assert compare_with_builtin(load_val_labels(write(tmp_path / "a", "\n".join(text).encode()), WNIDS)) == ()
    other = WNIDS[(val_index(17) + 1) % 1000]
    text[16] = f"{val_name(17)} {other}"
    (note,) = compare_with_builtin(load_val_labels(write(tmp_path / "b", "\n".join(text).encode()), WNIDS))
    assert val_name(17) in note
    assert str((val_index(17) + 1) % 1000) in note
