"""Validation labels, from any of the files in use or from the built-in table.

Files are told apart by their contents, never by their name:

- `<name> <wnid>` or `<name>,<wnid>`, and `<wnid>/<name>` alone
- `<name> <class index>`: Caffe's `val.txt` (https://github.com/BVLC/caffe/blob/master/data/ilsvrc12/get_ilsvrc_aux.sh),
  also below a folder (`val/<name>`, `val.zip@/<name>`), as MMPretrain and Paddle have it
  (https://mmpretrain.readthedocs.io/en/latest/user_guides/dataset_prepare.html)
- a wnid a line, in file-name order: TensorFlow's `imagenet_2012_validation_synset_labels.txt`
  (https://github.com/tensorflow/models/tree/master/research/inception/inception/data)
- an ILSVRC2012_ID a line, in file-name order: the devkit's `ILSVRC2012_validation_ground_truth.txt` (its readme.txt)
- Kaggle's `LOC_val_solution.csv` (https://www.kaggle.com/c/imagenet-object-localization-challenge/data)

Names may have a folder before them and may lack the extension or spell it otherwise. A header line, comments (`#`) and
a UTF-16 encoding are understood.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.dataset.textfile import decode, is_shell_script, read_bytes
from imagenet_unpack.errors import LabelError

_SEPARATOR = r'"?(?:[ \t]*,[ \t]*|[ \t]+)"?'
_NAME_AND_WNID = re.compile(rf'"?(\S.*?){_SEPARATOR}(n\d{{8}})"?')
_NAME_AND_INDEX = re.compile(rf'"?(\S.*?){_SEPARATOR}(\d{{1,9}})"?')
_KAGGLE = re.compile(r"([^,]+),(n\d{8})(?: .*)?")
_WNID_AND_NAME = re.compile(r"(?P<path>(?:.*/)?(n\d{8})/[^/\s]+)")
_WNID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"\d{1,9}")
_OFFICIAL = re.compile(r"(ILSVRC2012_val_\d{8})(?:\.jpe?g)?", re.IGNORECASE)
_FOLDER = re.compile(r"(?:^|/)(n\d{8})/[^/]*$")
_SHOWN = 5
_COUNTED_FROM = 10  # this many lines numbered 1, 2, 3, ... are no labels
_REMEDY = "give another file with --val-labels, or leave it out to use the built-in table"
_FORMATS = (
    "`<name> <wnid>`, `<name> <class index>`, a wnid a line, the devkit's ground truth or Kaggle's LOC_val_solution.csv"
)


class LabelsByName(Mapping[str, int]):
    """Class indices by the name of the image in the archive.

    An official name is found whatever its extension in the label file; a name without extension there stands for any.
    Iterating gives official names as the data set has them.
    """

    def __init__(self, given: dict[str, int]) -> None:
        self._given = given
        self._official = {official_name(name): index for name, index in given.items()}

    def __getitem__(self, name: str) -> int:
        for table, key in ((self._official, name), (self._given, name), (self._given, name.rpartition(".")[0])):
            index = table.get(key)
            if index is not None:
                return index
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._official)

    def __len__(self) -> int:
        return len(self._official)


def official_name(name: str) -> str:
    """Return the data set's own spelling of a validation image's name; any other name as it is."""
    match = _OFFICIAL.fullmatch(name)
    return f"{match[1]}.JPEG" if match else name


@dataclass(frozen=True, slots=True, kw_only=True)
class ValLabels:
    """Class indices of validation images.

    Attributes:
        by_name: file name to class index.
        source: where they come from, for messages.
    """

    by_name: Mapping[str, int]
    source: str


def load_val_labels(path: Path | None, wnids: tuple[str, ...]) -> ValLabels:
    """Return the validation labels of a file of any known format, or (None) of the built-in table.

    Files without names list the images 1, 2, 3, ... in their lines.

    Raises:
        LabelError: the format is unknown, or a line is damaged, a second one for its image, or names no class.
    """
    if path is None:
        return _builtin()
    return parse_val_labels(read_bytes(path, _REMEDY), str(path), wnids)


@functools.cache
def _builtin() -> ValLabels:
    table = ilsvrc2012.val_class_indices()
    by_name = {ilsvrc2012.val_name(number): index for number, index in enumerate(table, 1)}
    return ValLabels(by_name=MappingProxyType(by_name), source="the built-in table of validation labels")


def parse_val_labels(data: bytes, source: str, wnids: tuple[str, ...]) -> ValLabels:
    """Return the validation labels in the bytes of a file, as `load_val_labels` does; `source` names it in messages."""
    text = decode(data, source, _REMEDY)
    if is_shell_script(text):
        raise LabelError(f"{source}: this is a shell script (such as valprep.sh), not a label file: {_REMEDY}")
    return ValLabels(by_name=LabelsByName(_parse(source, _data_lines(source, text), wnids)), source=source)


def compare_with_builtin(labels: ValLabels) -> tuple[str, ...]:
    """Return a warning that names the first labels that are not those of the official data set, or nothing."""
    builtin = _builtin().by_name
    pairs = {(name, index, builtin[name]) for name, index in labels.by_name.items() if name in builtin}
    differ = sorted(pair for pair in pairs if pair[1] != pair[2])
    if not differ:
        return ()
    shown = ", ".join(f"{name} is {index}, published {published}" for name, index, published in differ[:_SHOWN])
    text = f"{labels.source}: {len(differ):,} of {len(pairs):,} labels are not the published ones ({shown})"
    if all(index == published + 1 for _, index, published in pairs):
        return (f"{text}: they count from 1, but class indices count from 0",)
    if len(differ) > len(pairs) // 2 and _is_another_order(pairs):
        return (f"{text}: they number the classes in another order, as the devkit's ILSVRC2012_ID does",)
    return (f"{text}: is it the right file?",)


def _is_another_order(pairs: Iterable[tuple[str, int, int]]) -> bool:
    renamed = {(index, published) for _, index, published in pairs}
    return len(renamed) == len({index for index, _ in renamed}) == len({published for _, published in renamed})


def _data_lines(source: str, text: str) -> list[tuple[int, str]]:
    """Return the lines with their numbers, without comments, blank lines and a header."""
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if len(lines) > 1 and not re.search(r"\d", lines[0][1]):
        del lines[0]
    if not lines:
        raise LabelError(f"{source}: contains no labels: {_REMEDY}")
    return lines


def _parse(source: str, lines: list[tuple[int, str]], wnids: tuple[str, ...]) -> dict[str, int]:
    by_wnid = {wnid: index for index, wnid in enumerate(wnids)}
    by_index = {str(index): index for index in range(len(wnids))}

    def val_name(number: int) -> str:
        if number > ilsvrc2012.VAL_IMAGES:
            raise LabelError(
                f"{source}: has more lines than the {ilsvrc2012.VAL_IMAGES:,} validation images: {_REMEDY}"
            )
        return ilsvrc2012.val_name(number)

    start, first = lines[0]
    for pattern, shape, classes in (
        (_KAGGLE, "<image>,<wnid> <box> ...", by_wnid),
        (_NAME_AND_WNID, "<name> <wnid>", by_wnid),
        (_NAME_AND_INDEX, "<name> <class index>", by_index),
        (_WNID_AND_NAME, "<wnid>/<name>", by_wnid),
    ):
        if pattern.fullmatch(first):
            found = list(_matches(source, lines, pattern, shape))
            if classes is by_index:
                _require_no_count(source, found)
            return _collect(source, found, classes, by_wnid)
    if _WNID.fullmatch(first) or _NUMBER.fullmatch(first):
        gap = next((place for place, (number, _) in enumerate(lines, start) if number != place), None)
        if gap is not None:
            raise LabelError(f"{source}, line {gap}: no label, although each line is the label of an image: {_REMEDY}")
    if _WNID.fullmatch(first):
        found = [(number, val_name(place), line) for place, (number, line) in enumerate(lines, 1)]
        return _collect(source, found, by_wnid, by_wnid)
    if _NUMBER.fullmatch(first):
        return _from_devkit_ids(source, [line for _, line in lines], val_name)
    raise LabelError(f"{source}, line {start}: unknown format of validation labels: {first[:80]!r}: use {_FORMATS}")


def _matches(
    source: str, lines: list[tuple[int, str]], pattern: re.Pattern[str], shape: str
) -> Iterator[tuple[int, str, str]]:
    for number, line in lines:
        match = pattern.fullmatch(line)
        if match is None:
            raise LabelError(
                f"{source}, line {number}: expected `{shape}` like the lines before: {line[:80]!r}: fix it or {_REMEDY}"
            )
        yield number, match[1], match[2]


def _require_no_count(source: str, found: list[tuple[int, str, str]]) -> None:
    if len(found) >= _COUNTED_FROM and all(label == str(place) for place, (_, _, label) in enumerate(found, 1)):
        raise LabelError(
            f"{source}: this is a list of the images numbered 1 to {len(found):,} (as in ImageSets/CLS-LOC), "
            f"not a label file: {_REMEDY}"
        )


def _collect(
    source: str, found: Iterable[tuple[int, str, str]], classes: dict[str, int], by_wnid: dict[str, int]
) -> dict[str, int]:
    labels: dict[str, int] = {}
    official: set[str] = set()
    for number, given, label in found:
        index = classes.get(label)
        if index is None:
            raise LabelError(f"{source}, line {number}: {label!r} is not a class of ImageNet-1K: fix it or {_REMEDY}")
        folder = _FOLDER.search(given)
        if folder and by_wnid.get(folder[1]) != index:
            raise LabelError(
                f"{source}, line {number}: {given} is in the folder of another class than {label}: fix it or {_REMEDY}"
            )
        name = given.rpartition("/")[2]
        if official_name(name) in official:
            raise LabelError(f"{source}, line {number}: a second label for {name}: remove one of them")
        official.add(official_name(name))
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
                f"{source}, line {number}: {line[:80]!r} stands for {ilsvrc2012.WNIDS[classes[line]]} before, but for "
                f"{val_name(number)} it would be {ilsvrc2012.WNIDS[index]}: not the devkit's ground truth of 2012"
            )
        labels[val_name(number)] = index
    if len(set(classes.values())) != len(classes):
        raise LabelError(f"{source}: two numbers stand for one class: not the devkit's ground truth of 2012")
    return labels
