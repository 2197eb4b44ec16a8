"""Names of images and of the paths of archives that hold them.

Hugging Face's `ILSVRC/imagenet-1k` appends the wnid to the names of labelled images (its `classes.py` and
`imagenet-1k.py` split it off at the last underscore): `n01440764_10026_n01440764.JPEG`,
`ILSVRC2012_val_00000293_n01440764.JPEG`. Test images keep their names.
"""

from __future__ import annotations

import re

from imagenet_unpack.model import SplitName

_KAGGLE = re.compile(r"((?:\./)?(?:[^/]+/)?(?:ILSVRC/)?Data/CLS-LOC)/(train|val|test)(?:/|$)")
_LABELLED = re.compile(r"(n[0-9]{8}_[0-9]+|ILSVRC2012_val_[0-9]{8})_(n[0-9]{8})(\.[A-Za-z]+)")
_OTHERS = re.compile(r"ILSVRC2012_(val|test)_[0-9]{8}\.")
_SPLITS: dict[str, SplitName] = {"val": "val", "test": "test"}
_TRAIN = re.compile(r"(n[0-9]{8})_[0-9]+\.[A-Za-z]+")


def original_name(name: str) -> tuple[str, str | None]:
    """Return the data set's own name of an image, and the wnid that was appended to it or None.

    A name without an appended wnid is returned as it is.
    """
    match = _LABELLED.fullmatch(name)
    return (match[1] + match[3], match[2]) if match else (name, None)


def train_wnid(name: str) -> str | None:
    """Return the wnid that a train image's own name begins with, or None if it is not such a name."""
    match = _TRAIN.fullmatch(name)
    return match[1] if match else None


def split_of_name(name: str) -> SplitName | None:
    """Return the split that an image's own name tells, or None if it tells none."""
    if train_wnid(name):
        return "train"
    match = _OTHERS.match(name)
    return _SPLITS[match[1]] if match else None


def is_leftover(name: str) -> bool:
    """Whether a path component is what macOS, Windows or a NAS device leaves in folders, and no data."""
    return name.startswith("._") or name in (".DS_Store", "Thumbs.db", "@eaDir", "__MACOSX")


def kaggle_prefix(path: str) -> str | None:
    """Return the part of a member's path that Kaggle's archives have in front of `/train`, `/val` and `/test`.

    That is `ILSVRC/Data/CLS-LOC`; a folder in front of it, or a missing `ILSVRC`, is taken too. None: not such a path.
    """
    match = _KAGGLE.match(path)
    return match[1] if match and not path.startswith("__MACOSX/") else None
