from __future__ import annotations

import json
from pathlib import Path

import pytest
from factory import WNIDS, write

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.dataset.class_index import load_class_index
from imagenet_unpack.errors import LabelError

NAMES = ilsvrc2012.class_names()


def entries() -> dict[str, list[str]]:
    return {str(index): [wnid, name] for index, (wnid, name) in enumerate(zip(WNIDS, NAMES, strict=True))}


def load(tmp_path: Path, text: str) -> tuple[str, ...]:
    return load_class_index(write(tmp_path / "index", text.encode()))


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(entries()),
        "\ufeff" + json.dumps(entries(), indent=1),
        json.dumps({wnid: index for index, wnid in enumerate(WNIDS)}),
        json.dumps(WNIDS),
        "\n".join(WNIDS),
        "".join(f"{wnid} {name}\r\n" for wnid, name in zip(WNIDS, NAMES, strict=True)),
        "".join(f"{wnid},{name}\n" for wnid, name in zip(WNIDS, NAMES, strict=True)),
    ],
    ids=["keras", "keras with a byte order mark", "class_to_idx", "list", "synsets.txt", "synset_words.txt", "csv"],
)
def test_every_known_format(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text) == WNIDS


def test_the_built_in_table() -> None:
    assert load_class_index(None) == WNIDS
    assert len(NAMES) == 1000
    assert NAMES[0] == "tench, Tinca tinca"


def test_another_order_is_refused(tmp_path: Path) -> None:
    swapped = entries()
    swapped["0"], swapped["1"] = swapped["1"], swapped["0"]
    with pytest.raises(LabelError, match="class 0"):
        load(tmp_path, json.dumps(swapped))
    devkit = "".join(f"{wnid} {number} name\n" for number, wnid in enumerate(reversed(WNIDS), 1))
    with pytest.raises(LabelError, match="ILSVRC2012_ID"):
        load(tmp_path, devkit)
    meta = write(tmp_path / "meta.mat", b"MATLAB 5.0 MAT-file, Platform: GLNXA64\xff\xfe\0")
    with pytest.raises(LabelError, match="ILSVRC2012_ID"):
        load_class_index(meta)


@pytest.mark.parametrize("text", [json.dumps(NAMES), "\n".join(NAMES), json.dumps(dict(enumerate(NAMES)))])
def test_names_alone_are_no_class_index(tmp_path: Path, text: str) -> None:
    with pytest.raises(LabelError, match="crane"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{}", "[1]", '{"0": ["n01440764"]}', '{"0": "x"}', '{"a": ["n01440764"]}', "{" * 9, "#!/bin/sh\n"]
    + [bracket * 200_000 for bracket in ("[", '{"0":')],
    ids=str.__len__,
)
def test_what_is_none(tmp_path: Path, text: str) -> None:
    with pytest.raises(LabelError, match="index"):
        load(tmp_path, text)


def test_a_class_twice(tmp_path: Path) -> None:
    double = entries()
    double["5"] = double["4"]
    with pytest.raises(LabelError, match=WNIDS[4]):
        load(tmp_path, json.dumps(double))
