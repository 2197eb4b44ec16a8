"""Recognise what a file or folder is and which splits it contains, by content; names only say where to look.

Nothing is decompressed or decoded beyond the first members. Shapes of the archives: the data set's own tars, Kaggle's
`imagenet-object-localization-challenge`, Hugging Face's `ILSVRC/imagenet-1k` in both forms, and image-net.org's
`winter21_whole.tar`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.dataset.names import is_leftover, kaggle_prefix, original_name, train_wnid
from imagenet_unpack.errors import ArchiveError, MissingArchiveError, reason
from imagenet_unpack.model import SPLITS, SplitName
from imagenet_unpack.sources import magic
from imagenet_unpack.sources.archive import opened
from imagenet_unpack.sources.compressed import peek
from imagenet_unpack.sources.imagerecord import SQUASHFS_MAGIC
from imagenet_unpack.sources.imagerun import record_of
from imagenet_unpack.sources.parquet import split_of_parquet
from imagenet_unpack.sources.tarindex import EndOfArchive, Entry, ReadAt, iter_entries

Kind = Literal["inner-tars", "tar-folder", "images", "zip", "parquet", "image", "stream"]

_WNID_TAR = re.compile(r"(?:[^/]+/)?n[0-9]{8}\.tar")
_WNID_TAR_FILE = re.compile(r"n[0-9]{8}\.(tar(\.gz|\.zst|\.xz|\.bz2)?|tgz)")
_CLASS_FOLDER = re.compile(r"(?:[^/]+/)?n[0-9]{8}/n[0-9]{8}_[^/]*")
_PARQUET = re.compile(r"(train|validation|val|test)(?:-[0-9]+-of-[0-9]+)?\.parquet")
_PARQUET_SPLITS: dict[str, SplitName] = {"train": "train", "validation": "val", "val": "val", "test": "test"}
_TASK_3 = re.compile(r"ILSVRC2012_img_train_t3\b.*")
_PEEKED_BYTES = 1 << 20
_PEEKED_ENTRIES = 64
_FAR = 1 << 62
_COMPRESSED = ("", ".gz", ".tgz", ".zst", ".xz", ".bz2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file or a folder that holds images.

    Attributes:
        kind: `inner-tars` (a tar of `<wnid>.tar`), `tar-folder` (a folder of them), `images` (a flat tar of val or
            test), `zip` (Kaggle's), `parquet`, `image` (a mountable one of this program), or `stream`: a tar that can
            only be read front to back, as it is compressed or holds 1.3 million images one after another.
        paths: the file or the folder; several files where they make one split together.
        splits: what it holds.
        what: for people.
        compression: of a stream: `gzip`, `zstd`, `xz`, `bzip2` or "".
        piece: it may be one of several that make one split together (Hugging Face's files).
    """

    kind: Kind
    paths: tuple[Path, ...]
    splits: tuple[SplitName, ...]
    what: str
    compression: str = ""
    piece: bool = False

    @property
    def name(self) -> str:
        """How messages call it."""
        more = len(self.paths) - 1
        return str(self.paths[0]) + (f" and {more} more" if more else "")


def recognise_file(path: Path) -> Source:
    """Say what a file is.

    Raises:
        ArchiveError: it is missing, cannot be read, or is something else: the message says what.
    """
    if _TASK_3.fullmatch(path.name):
        wanted = ilsvrc2012.TRAIN_ARCHIVE_NAME
        raise ArchiveError(f"{path}: this is the train archive of task 3 (dogs); expected {wanted}")
    with opened(path) as (info, read_at):
        head = read_at(0, magic.HEAD_BYTES)
        compression = magic.compression(head)
        if compression:
            return _recognise_compressed(path, compression)
        if head.startswith(b"PK"):
            return Source(kind="zip", paths=(path,), splits=SPLITS, what="zip")
        if head.startswith(b"PAR1"):
            return _recognise_parquet(path)
        if head.startswith(SQUASHFS_MAGIC):
            held = record_of(path).splits
            splits = tuple(split for split in SPLITS if split in held)
            return Source(kind="image", paths=(path,), splits=splits, what="image")
        paths, failed = first_paths(read_at, info.st_size, str(path))
    if failed is not None and not paths:
        raise failed
    if not any(head):
        raise ArchiveError(f"{path}: begins with zeros: nothing of it has been downloaded yet, or it is damaged")
    return _recognise_tar(path, paths, "")


def recognise_folder(folder: Path) -> Source | None:
    """Say whether a folder is the outer train archive, unpacked: a folder of `<wnid>.tar`.

    Raises:
        ArchiveError: it cannot be read.
    """
    if any(_WNID_TAR_FILE.fullmatch(name) for name in names_in(folder)):
        return Source(kind="tar-folder", paths=(folder,), splits=("train",), what="folder of inner tars")
    return None


def parquet_split(name: str) -> SplitName | None:
    """Return the split that a parquet file of Hugging Face holds, by its name."""
    match = _PARQUET.fullmatch(name)
    return _PARQUET_SPLITS[match[1]] if match else None


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, sorted.

    Raises:
        ArchiveError: it cannot be read.
    """
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        raise MissingArchiveError(f"{folder}: no such folder") from None
    except OSError as error:
        raise ArchiveError(f"{folder}: cannot be read: {reason(error)}") from error


class UnknownMembersError(ArchiveError):
    """It is a tar, but no member has a known name."""


def _recognise_tar(path: Path, paths: list[str], compression: str) -> Source:
    """Judge a tar by the paths of its first members."""

    def source(kind: Kind, splits: tuple[SplitName, ...], what: str, *, piece: bool = False) -> Source:
        if compression:
            kind, what = "stream", f"{what}, compressed with {compression}"
        return Source(kind=kind, paths=(path,), splits=splits, what=what, compression=compression, piece=piece)

    if not paths:
        raise ArchiveError(f"{path}: contains neither images nor inner tars")
    first, name = paths[0], paths[0].rpartition("/")[2]
    if _WNID_TAR.fullmatch(first):
        return source("inner-tars", ("train",), "tar of inner tars")
    if any(kaggle_prefix(each) is not None for each in paths) or first.startswith("ILSVRC/"):
        return source("stream", ("train", "val", "test"), "tar of Kaggle's shape")
    if original_name(name)[1] is not None:
        split: SplitName = "train" if train_wnid(original_name(name)[0]) else "val"
        return source("stream", (split,), f"{split} tar of Hugging Face's shape", piece=split == "train")
    for split in ("val", "test"):
        if name.startswith(f"ILSVRC2012_{split}_"):
            return source("images", (split,), f"flat tar of {'validation' if split == 'val' else 'test'} images")
    raise something_else(str(path), paths)


def something_else(archive: str, paths: Sequence[str]) -> ArchiveError:
    """Return the error that says what a tar is that is not taken, by the paths of its first files."""
    first = paths[0]
    if any("devkit" in each.partition("/")[0] or each.endswith("data/meta.mat") for each in paths):
        return ArchiveError(f"{archive}: this is the development kit, which contains no images")
    if _CLASS_FOLDER.fullmatch(first):
        return ArchiveError(
            f"{archive}: holds class folders ({first!r}); expected a tar of <wnid>.tar, the shape of "
            f"{ilsvrc2012.TRAIN_ARCHIVE_NAME}"
        )
    if train_wnid(first.rpartition("/")[2]) is not None:
        return ArchiveError(
            f"{archive}: this is a single inner tar ({first!r}), or train images without inner tars: expected a tar or "
            "a folder of <wnid>.tar"
        )
    return UnknownMembersError(f"{archive}: a tar, but not of ImageNet: its first member is {first!r}")


def _recognise_compressed(path: Path, compression: str) -> Source:
    _, head = peek(path, _PEEKED_BYTES)
    if not head:
        raise ArchiveError(f"{path}: compressed with {compression}, but empty or damaged: download it again")
    what = magic.describe(head[: magic.HEAD_BYTES])
    if what:
        raise ArchiveError(f"{path}: compressed with {compression}, and inside is {what}, not a tar archive")
    paths, failed = first_paths(lambda at, size: head[at : at + size], _FAR, f"{path} (decompressed)")
    if failed is not None and not paths:
        raise ArchiveError(f"{path}: compressed with {compression}, but not a tar inside: {failed}")
    return _recognise_tar(path, paths, compression)


def _recognise_parquet(path: Path) -> Source:
    # What the name says is verified by the plan, which reads the names of all images anyway.
    split = parquet_split(path.name) or split_of_parquet(str(path))
    return Source(kind="parquet", paths=(path,), splits=(split,), what="parquet", piece=True)


def first_paths(read_at: ReadAt, end: int, archive: str) -> tuple[list[str], ArchiveError | None]:
    """Return the paths of the first files of a tar, and what kept it from being read further."""
    paths: list[str] = []
    try:
        for entry in iter_entries(read_at, 0, end, archive):
            if isinstance(entry, EndOfArchive) or len(paths) == _PEEKED_ENTRIES:
                break
            if _is_data(entry):
                paths.append(entry.path.removeprefix("./"))
    except ArchiveError as error:
        return paths, error
    return paths, None


def _is_data(entry: Entry) -> bool:
    return entry.kind != b"5" and not any(map(is_leftover, entry.path.split("/"))) and entry.path.strip("./") != ""
