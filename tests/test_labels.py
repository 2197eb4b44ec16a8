from __future__ import annotations

import json
from pathlib import Path

import pytest
from factory import WNIDS, val_index, val_name, write

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.dataset.labels import compare_with_builtin, load_class_index, load_val_labels
from imagenet_unpack.errors import LabelError

TABLE = ilsvrc2012.val_class_indices()
EXPECTED = {val_name(number): index for number, index in enumerate(TABLE, 1)}
# Any one-to-one renaming of the classes is as good as the devkit's.
DEVKIT = [str((index * 7 + 3) % 1000 + 1) for index in TABLE]


def lines(kind: str) -> list[str]:
    return {
        "name and wnid": [f"{name} {WNIDS[index]}" for name, index in EXPECTED.items()],
        "name and index": [f"{name} {index}" for name, index in EXPECTED.items()],
        "tabs": [f"{name}\t{WNIDS[index]}" for name, index in EXPECTED.items()],
        "wnids": [WNIDS[index] for index in TABLE],
        "devkit": DEVKIT,
        "kaggle": [
            "ImageId,PredictionString",
            *(f"{name.removesuffix('.JPEG')},{WNIDS[index]} 85 1 499 272 " for name, index in EXPECTED.items()),
        ],
    }[kind]


KINDS = ["name and wnid", "name and index", "tabs", "wnids", "devkit", "kaggle"]


@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_known_format(tmp_path: Path, kind: str, ending: str) -> None:
    text = "\ufeff" + ending.join(lines(kind)) + ending * 3
    path = write(tmp_path / "labels", text.encode())
    assert load_val_labels(path, WNIDS).by_name == EXPECTED


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


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="none"):
        load_val_labels(tmp_path / "none", WNIDS)


def test_a_difference_from_the_built_in_table_is_a_warning(tmp_path: Path) -> None:
    text = lines("name and wnid")
    assert compare_with_builtin(load_val_labels(write(tmp_path / "a", "\n".join(text).encode()), WNIDS)) == ()
    other = WNIDS[(val_index(17) + 1) % 1000]
    text[16] = f"{val_name(17)} {other}"
    (note,) = compare_with_builtin(load_val_labels(write(tmp_path / "b", "\n".join(text).encode()), WNIDS))
    assert val_name(17) in note
    assert str((val_index(17) + 1) % 1000) in note


class TestClassIndex:
    def entries(self) -> dict[str, list[str]]:
        return {str(index): [wnid, "name"] for index, wnid in enumerate(WNIDS)}

    def load(self, tmp_path: Path, text: str) -> tuple[str, ...]:
        return load_class_index(write(tmp_path / "index.json", text.encode()))

    def test_is_read(self, tmp_path: Path) -> None:
        assert self.load(tmp_path, "\ufeff" + json.dumps(self.entries())) == WNIDS
        assert load_class_index(None) == WNIDS

    def test_another_order(self, tmp_path: Path) -> None:
        entries = self.entries()
        entries["0"], entries["1"] = entries["1"], entries["0"]
        with pytest.raises(LabelError, match="class 0"):
            self.load(tmp_path, json.dumps(entries))

    @pytest.mark.parametrize(
        "text", ["", "[]", "3", "{}", '{"0": ["n01440764"]}', '{"0": "x"}', '{"a": ["n01440764"]}']
    )
    def test_what_is_none(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(LabelError, match="index"):
            self.load(tmp_path, text)

    def test_a_class_twice(self, tmp_path: Path) -> None:
        entries = self.entries()
        entries["5"] = entries["4"]
        with pytest.raises(LabelError, match=WNIDS[4]):
            self.load(tmp_path, json.dumps(entries))
