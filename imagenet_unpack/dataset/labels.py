"""Class index and validation labels, from any of the files in use or from the built-in tables.

Files are told apart by their first line, never by their name. Formats: the Keras class index (JSON); for validation
`<name> <wnid>`, Caffe's `<name> <class index>`, a wnid a line (TensorFlow), an ILSVRC2012_ID a line (the devkit's
ILSVRC2012_validation_ground_truth.txt), and Kaggle's LOC_val_solution.csv.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.errors import LabelError

_WNID = re.compile(r"n\d{8}")
_NAME_AND_WNID = re.compile(r"(\S.*?)[ \t]+(n\d{8})")
_NAME_AND_INDEX = re.compile(r"(\S.*?)[ \t]+(\d{1,9})")
_NUMBER = re.compile(r"\d{1,9}")
_KAGGLE_HEADER = "ImageId,PredictionString"
_KAGGLE = re.compile(r"([^,]+),(n\d{8})\b.*")
_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ValLabels:
    """Class indices of validation images.

    Attributes:
        by_name: file name to class index.
        source: where they come from, for messages.
    """

    by_name: dict[str, int]
    source: str


def load_class_index(path: Path | None) -> tuple[str, ...]:
    """Return the 1000 wnids in class-index order, from a Keras class index or (None) the built-in table.

    Raises:
        LabelError: it is not the class index of ImageNet-1K in lexical order.
    """
    if path is None:
        return ilsvrc2012.WNIDS
    remedy = "mend it, or leave it out: the built-in table is used then"
    try:
        entries = json.loads(_decode(_read_bytes(path), str(path)), object_pairs_hook=lambda pairs: pairs)
    except ValueError as error:
        raise LabelError(f"{path}: is not JSON ({error}): {remedy}") from None
    if not isinstance(entries, list) or not all(isinstance(entry, tuple) for entry in entries):
        raise LabelError(f'{path}: is no JSON object like {{"0": ["n01440764", "tench"], ...}}: {remedy}')
    known = frozenset(ilsvrc2012.WNIDS)
    wnids: dict[int, str] = {}
    places: dict[str, str] = {}
    for key, value in entries:
        wnid = value[0] if isinstance(value, list) and value else value
        if not isinstance(wnid, str) or wnid not in known:
            raise LabelError(f"{path}: class {key!r} has no wnid of ImageNet-1K but {wnid!r}: {remedy}")
        if not key.isascii() or not key.isdecimal() or int(key) in wnids:
            raise LabelError(f"{path}: class {key!r} is no class index, or stands there twice: {remedy}")
        if wnid in places:
            raise LabelError(f"{path}: {wnid} is both class {places[wnid]} and class {key}: {remedy}")
        wnids[int(key)] = wnid
        places[wnid] = key
    if len(wnids) != len(ilsvrc2012.WNIDS):
        raise LabelError(f"{path}: has {len(wnids)} classes, ImageNet-1K has {len(ilsvrc2012.WNIDS)}: {remedy}")
    for index, wnid in enumerate(ilsvrc2012.WNIDS):
        if wnids.get(index) != wnid:
            raise LabelError(
                f"{path}: class {index} is {wnids.get(index)}, but in the lexical order of the wnids it is {wnid}: "
                f"{remedy}"
            )
    return ilsvrc2012.WNIDS


def load_val_labels(path: Path | None, wnids: tuple[str, ...]) -> ValLabels:
    """Return the validation labels of a file of any known format, or (None) of the built-in table.

    Files without names have the images 1, 2, 3, ... in their lines.

    Raises:
        LabelError: the format is unknown, or a line is damaged, a second one for its image, or names no class.
    """
    if path is None:
        table = ilsvrc2012.val_class_indices()
        return ValLabels(
            by_name={ilsvrc2012.val_name(number): index for number, index in enumerate(table, 1)},
            source="the built-in table of validation labels",
        )
    return parse_val_labels(_read_bytes(path), str(path), wnids)


def parse_val_labels(data: bytes, source: str, wnids: tuple[str, ...]) -> ValLabels:
    """Return the validation labels in the content of a file, as `load_val_labels` does; `source` is for messages."""
    lines = [line.strip() for line in _decode(data, source).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise LabelError(f"{source}: is empty: give another file with --val-labels")
    return ValLabels(by_name=_parse(source, lines, wnids), source=source)


def compare_with_builtin(labels: ValLabels) -> tuple[str, ...]:
    """Return a warning that names the first labels that are not those of the official data set, or nothing."""
    builtin = load_val_labels(None, ilsvrc2012.WNIDS).by_name
    differ = [name for name, index in sorted(labels.by_name.items()) if builtin.get(name, index) != index]
    if not differ:
        return ()
    shown = ", ".join(f"{name} is {labels.by_name[name]}, published {builtin[name]}" for name in differ[:_SHOWN])
    return (f"{labels.source}: {len(differ)} labels are not the published ones ({shown}): is it the right file?",)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise LabelError(f"{path}: cannot be read: {error.strerror}: give another file or leave it out") from None


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise LabelError(f"{source}: is not UTF-8 text: is it the right file?") from None


def _parse(source: str, lines: list[str], wnids: tuple[str, ...]) -> dict[str, int]:
    by_wnid = {wnid: index for index, wnid in enumerate(wnids)}
    by_index = {str(index): index for index in range(len(wnids))}

    def val_name(number: int) -> str:
        if number > ilsvrc2012.VAL_IMAGES:
            raise LabelError(f"{source}, line {number}: more lines than the {ilsvrc2012.VAL_IMAGES:,} images there are")
        return ilsvrc2012.val_name(number)

    if lines[0] == _KAGGLE_HEADER or _KAGGLE.fullmatch(lines[0]):
        first = 2 if lines[0] == _KAGGLE_HEADER else 1
        pairs = _matches(source, lines, first, _KAGGLE, "<image>,<wnid> <box> ...")
        return _collect(source, ((number, f"{name}.JPEG", wnid) for number, name, wnid in pairs), by_wnid)
    if _NAME_AND_WNID.fullmatch(lines[0]):
        return _collect(source, _matches(source, lines, 1, _NAME_AND_WNID, "<name> <wnid>"), by_wnid)
    if _NAME_AND_INDEX.fullmatch(lines[0]):
        return _collect(source, _matches(source, lines, 1, _NAME_AND_INDEX, "<name> <class index>"), by_index)
    if _WNID.fullmatch(lines[0]):
        found = ((number, val_name(number), line) for number, line in enumerate(lines, 1))
        return _collect(source, found, by_wnid)
    if _NUMBER.fullmatch(lines[0]):
        return _from_devkit_ids(source, lines, val_name)
    raise LabelError(
        f"{source}, line 1: no known format of validation labels: {lines[0][:80]!r}: give `<name> <wnid>`, "
        "`<name> <class index>`, a wnid a line, the devkit's ground truth or Kaggle's LOC_val_solution.csv"
    )


def _matches(
    source: str, lines: list[str], first: int, pattern: re.Pattern[str], shape: str
) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(lines[first - 1 :], first):
        match = pattern.fullmatch(line)
        if match is None:
            raise LabelError(f"{source}, line {number}: is not `{shape}` like the lines before: {line[:80]!r}: mend it")
        yield number, match[1], match[2]


def _collect(source: str, found: Iterator[tuple[int, str, str]], classes: dict[str, int]) -> dict[str, int]:
    labels: dict[str, int] = {}
    for number, name, label in found:
        index = classes.get(label)
        if index is None:
            raise LabelError(
                f"{source}, line {number}: {label!r} is no class of ImageNet-1K: mend it or take another file"
            )
        if name in labels:
            raise LabelError(f"{source}, line {number}: a second label for {name}: remove one of them")
        labels[name] = index
    return labels


def _from_devkit_ids(source: str, lines: list[str], val_name: Callable[[int], str]) -> dict[str, int]:
    """Take an ILSVRC2012_ID a line, if every ID stands for one class of the built-in table and no two for one.

    The IDs are another order of the classes, and the devkit's table of them is a MATLAB file; what 50,000 images say
    of 1000 IDs without one contradiction is as good.
    """
    table = ilsvrc2012.val_class_indices()
    if len(lines) != len(table):
        raise LabelError(
            f"{source}: has {len(lines):,} lines with a number each, the devkit's ground truth has {len(table):,}: "
            "take the whole file, or another format"
        )
    classes: dict[str, int] = {}
    labels: dict[str, int] = {}
    for number, (line, index) in enumerate(zip(lines, table, strict=True), 1):
        if classes.setdefault(line, index) != index:
            raise LabelError(
                f"{source}, line {number}: {line[:80]!r} stood for {ilsvrc2012.WNIDS[classes[line]]} before, for image "
                f"{val_name(number)} it would be {ilsvrc2012.WNIDS[index]}: not the devkit's ground truth of 2012"
            )
        labels[val_name(number)] = index
    if len(set(classes.values())) != len(classes):
        raise LabelError(f"{source}: two numbers stand for one class: not the devkit's ground truth of 2012")
    return labels
