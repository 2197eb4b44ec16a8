"""The 1000 wnids in class-index order, from any of the files in use or built in.

Files are told apart by their contents, never by their name:

- Keras's `imagenet_class_index.json`, `{"0": ["n01440764", "tench"], ...}`: `decode_predictions` in
  https://github.com/keras-team/keras/blob/master/keras/src/applications/imagenet_utils.py
- a JSON object of wnid to class index (a saved `class_to_idx`), or a JSON list of wnids
- lines that begin with a wnid: Caffe's `synset_words.txt` and `synsets.txt`
  (https://github.com/BVLC/caffe/blob/master/data/ilsvrc12/get_ilsvrc_aux.sh), Kaggle's `LOC_synset_mapping.txt`
  (https://www.kaggle.com/c/imagenet-object-localization-challenge/data)

The devkit's tables (`meta.mat`, `map_clsloc.txt`) number the classes by ILSVRC2012_ID, which is another order.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.dataset.textfile import decode, is_shell_script, read_bytes
from imagenet_unpack.errors import LabelError

_WNID_LINE = re.compile(r"(n\d{8})(?:[\s,].*)?")
_NO_NAMES = "names cannot tell classes apart: two are called crane"
_REMEDY = "fix it, or leave it out to use the built-in table"


def load_class_index(path: Path | None) -> tuple[str, ...]:
    """Return the 1000 wnids in class-index order, from a file of any known format or (None) the built-in table.

    Raises:
        LabelError: it is not the class index of ImageNet-1K in lexical order.
    """
    if path is None:
        return ilsvrc2012.WNIDS
    text = decode(read_bytes(path, _REMEDY), str(path), _REMEDY)
    if is_shell_script(text):
        raise LabelError(f"{path}: this is a shell script, not a class index: {_REMEDY}")
    _require_lexical(path, _from_json(path, text) if text.lstrip()[:1] in ("{", "[") else _from_lines(path, text))
    return ilsvrc2012.WNIDS


def _from_lines(path: Path, text: str) -> dict[int, str]:
    wnids: dict[int, str] = {}
    for number, line in enumerate(filter(None, map(str.strip, text.splitlines())), 1):
        match = _WNID_LINE.fullmatch(line)
        if match is None:
            raise LabelError(
                f"{path}: no class index: {line[:80]!r} does not begin with a wnid ({_NO_NAMES}): {_REMEDY}"
            )
        wnids[number - 1] = match[1]
    return wnids


def _from_json(path: Path, text: str) -> dict[int, str]:
    try:
        entries = json.loads(text, object_pairs_hook=lambda pairs: pairs)
    except RecursionError:
        raise LabelError(f"{path}: this JSON is nested too deeply for a class index: {_REMEDY}") from None
    except ValueError as error:
        raise LabelError(f"{path}: this is not valid JSON ({error}): {_REMEDY}") from None
    if entries and all(isinstance(entry, str) for entry in entries):
        entries = [(str(index), wnid) for index, wnid in enumerate(entries)]
    if not isinstance(entries, list) or not all(isinstance(entry, tuple) for entry in entries):
        raise LabelError(f'{path}: not a JSON object like {{"0": ["n01440764", "tench"], ...}}: {_REMEDY}')
    known = frozenset(ilsvrc2012.WNIDS)
    wnids: dict[int, str] = {}
    for key, value in entries:
        index, wnid = (str(value), key) if key in known and isinstance(value, int) else (key, _first(value))
        if wnid not in known:
            raise LabelError(
                f"{path}: class {index!r} has no wnid of ImageNet-1K but {wnid!r} ({_NO_NAMES}): {_REMEDY}"
            )
        if not (index.isascii() and index.isdecimal()) or int(index) in wnids:
            raise LabelError(f"{path}: {index!r} is not a class index, or it appears twice: {_REMEDY}")
        wnids[int(index)] = wnid
    return wnids


def _first(value: Any) -> str:
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, str) else repr(first)[:80]


def _require_lexical(path: Path, wnids: dict[int, str]) -> None:
    places: dict[str, int] = {}
    for index, wnid in wnids.items():
        if wnid in places:
            raise LabelError(f"{path}: {wnid} is both class {places[wnid]} and class {index}: {_REMEDY}")
        places[wnid] = index
    if len(wnids) != len(ilsvrc2012.WNIDS):
        raise LabelError(f"{path}: has {len(wnids)} classes, but ImageNet-1K has {len(ilsvrc2012.WNIDS)}: {_REMEDY}")
    for index, wnid in enumerate(ilsvrc2012.WNIDS):
        if wnids.get(index) != wnid:
            raise LabelError(
                f"{path}: class {index} is {wnids.get(index)}, but in the lexical order of the wnids it is {wnid} (the "
                f"devkit's ILSVRC2012_ID is another order and no class index): {_REMEDY}"
            )
