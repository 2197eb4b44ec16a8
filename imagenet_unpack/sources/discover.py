"""Find sources: those that a user names, and those with the usual names in a folder."""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.errors import ArchiveError, MissingArchiveError, reason
from imagenet_unpack.model import SPLITS, SplitName
from imagenet_unpack.sources.recognise import (
    Source,
    UnknownMembersError,
    names_in,
    parquet_split,
    recognise_file,
    recognise_folder,
)

_COMPRESSED = r"(\.gz|\.zst|\.xz|\.bz2)?"
_KAGGLE = r"imagenet-object-localization-challenge\.zip|imagenet_object_localization_patched2019\.tar" + _COMPRESSED
_USUAL: dict[SplitName, re.Pattern[str]] = {
    "train": re.compile(rf"ILSVRC2012_img_train\.(tar{_COMPRESSED}|tgz)|train_images_[0-9]+\.tar\.gz|{_KAGGLE}"),
    "val": re.compile(rf"ILSVRC2012_img_val\.(tar{_COMPRESSED}|tgz)|val_images\.tar\.gz|{_KAGGLE}"),
    "test": re.compile(rf"ILSVRC2012_img_test(_v10102019)?\.(tar{_COMPRESSED}|tgz)|test_images\.tar\.gz|{_KAGGLE}"),
}
_USUAL_21K = re.compile(rf"(winter21|fall11)_whole\.(tar{_COMPRESSED}|tgz)")
_FOLDERS = ("ILSVRC2012_img_train",)
_FOLDERS_21K = (*_FOLDERS, "winter21_whole", "fall11_whole")
_STEMS: dict[SplitName, tuple[str, ...]] = {
    "train": (
        ilsvrc2012.TRAIN_ARCHIVE_NAME.removesuffix(".tar"),
        "imagenet-object-localization-challenge",
        "imagenet_object_localization_patched2019",
    ),
    "val": (ilsvrc2012.VAL_ARCHIVE_NAME.removesuffix(".tar"),),
    "test": ("ILSVRC2012_img_test",),
}
# What split(1) and download managers append: .part-aa, .aa, .part1, .001.
_PIECE = re.compile(r"(.+?\.(?:tar|tgz|zip)(?:\.gz)?)\.(?:part-?[a-z0-9]{1,4}|(?!gz|xz)[a-z]{2}|[0-9]{2,4})")
_SHOWN = 3


def find(path: Path, splits: Collection[SplitName] = SPLITS, *, any_wnids: bool = False) -> tuple[Source, ...]:
    """Recognise a file, or in a folder the sources of some splits, that a user names.

    Raises:
        MissingArchiveError: it is not there.
        ArchiveError: it cannot be read, or is something else: the message says what.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise _missing(path) from None
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be read: {reason(error)}") from error
    if not stat.S_ISDIR(mode):
        _refuse_piece(path)
        return (recognise_file(path),)
    found = discover(path, splits, any_wnids=any_wnids)
    if not found:
        raise ArchiveError(f"{path}: contains no archive with a usual name")
    return found


def find_split(path: Path, split: SplitName) -> Source:
    """Recognise a file or a folder of which a user says that it holds a split.

    A tar whose members have unknown names is then taken as a flat tar of that split.

    Raises:
        ArchiveError: as `find`, or it does not hold the split.
    """
    try:
        found = find(path, (split,), any_wnids=True)
    except UnknownMembersError:
        if split == "train":
            raise
        return Source(kind="images", paths=(path,), splits=(split,), what="flat tar of images")
    for source in found:
        if split in source.splits:
            return replace(source, splits=(split,))
    other = found[0]
    raise ArchiveError(
        f"{path}: has no {split} split: this is a {other.what}: give it with --{other.splits[0]}-archive or --source"
    )


def discover(folder: Path, splits: Collection[SplitName] = SPLITS, *, any_wnids: bool = False) -> tuple[Source, ...]:
    """Find the sources of some splits that lie in a folder under usual names.

    They may also lie in its sub-folder `data/`, as in Hugging Face's repository; or the folder itself is one of inner
    tars. Nothing else is looked at, so that no damaged archive of another split is in the way.

    Raises:
        ArchiveError: a file of a usual name is something else or another split, or the folder cannot be read.
    """
    found: list[Source] = []
    for place in (folder, folder / "data"):
        if not place.is_dir():
            continue
        for name in names_in(place):
            named = [split for split in SPLITS if _is_usual(name, split, any_wnids=any_wnids)]
            if not set(named).isdisjoint(splits):
                found.extend([find_split(place / name, named[0])] if len(named) == 1 else find(place / name))
            elif "train" in splits and name in (_FOLDERS_21K if any_wnids else _FOLDERS):
                found.extend([source] if (source := _inner_tars(place / name)) else [])
    if "train" in splits and (source := recognise_folder(folder)):
        found.append(source)
    return join(found)


def join(sources: Iterable[Source]) -> tuple[Source, ...]:
    """Put the pieces of each split together."""
    joined: dict[tuple[str, tuple[SplitName, ...]], Source] = {}
    rest: list[Source] = []
    for source in sources:
        key = (source.kind, source.splits)
        if not source.piece:
            rest.append(source)
        elif key in joined:
            joined[key] = replace(joined[key], paths=(*joined[key].paths, *source.paths))
        else:
            joined[key] = source
    return (*rest, *joined.values())


def near_misses(folder: Path, split: SplitName) -> str:
    """Say which names in a folder resemble the usual one of a split, and how to join pieces; "" if none does."""
    try:
        names = [name for name in names_in(folder) if name.startswith(_STEMS[split])]
    except ArchiveError:
        return ""
    others = [name for name in names if not _is_usual(name, split, any_wnids=False)]
    return _pieces(folder, names) or (f"is it {_few(others)}?" if others else "")


def _is_usual(name: str, split: SplitName, *, any_wnids: bool) -> bool:
    if any_wnids and split == "train" and _USUAL_21K.fullmatch(name):
        return True
    return _USUAL[split].fullmatch(name) is not None or parquet_split(name) == split


def _inner_tars(folder: Path) -> Source | None:
    return recognise_folder(folder) if folder.is_dir() else None


def _missing(path: Path) -> MissingArchiveError:
    try:
        names = [name for name in names_in(path.parent) if name.startswith(path.name.removesuffix(".tar"))]
    except ArchiveError:
        names = []
    hint = _pieces(path.parent, names) or (f"is it {_few(names)}?" if names else "")
    return MissingArchiveError(f"{path}: no such file" + (f": {hint}" if hint else ""))


def _refuse_piece(path: Path) -> None:
    """Raise an error if a file is a piece of an archive."""
    match = _PIECE.fullmatch(path.name)
    if match is not None:
        names = [name for name in names_in(path.parent) if name.startswith(match[1])]
        raise ArchiveError(f"{path}: a piece of an archive: {_pieces(path.parent, names)}")


def _pieces(folder: Path, names: Iterable[str]) -> str:
    """Say that pieces of an archive are among these names, and how to join them, or ""."""
    pieces: dict[str, list[str]] = {}
    for name in sorted(names):
        match = _PIECE.fullmatch(name)
        if match:
            pieces.setdefault(match[1], []).append(name)
    for whole, parts in pieces.items():
        prefix = shlex.quote(str(folder / os.path.commonprefix(parts)))  # noqa: RUF071 - of characters
        command = f"cat {prefix}* > {shlex.quote(str(folder / whole))}"
        return f"it is there in {len(parts)} pieces ({_few(parts)}): join them with `{command}`"
    return ""


def _few(names: list[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
