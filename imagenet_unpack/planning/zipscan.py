"""Contents of Kaggle's zip: its central directory, sorted into splits.

The zip has about 1.4 million entries, annotations included. They are read once, front to back in pieces; what is kept
of a member are a few numbers in arrays, and the workers read the entries of their runs again.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import zlib
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from imagenet_unpack.dataset.names import is_leftover, kaggle_prefix
from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.model import SplitName
from imagenet_unpack.sources import zipindex
from imagenet_unpack.sources.tarindex import ReadAt
from imagenet_unpack.sources.zipindex import Entry
from imagenet_unpack.sources.zipmember import PATCHED_NAME

SOLUTION_NAME = b"LOC_val_solution.csv"
_MAX_SMALL_BYTES = 64 << 20  # the real LOC_val_solution.csv has about 2 MB
NO_CLASS = -1
# Programs of Windows put backslashes into the paths of members.
_IMAGE_NAME = re.compile(rb"(?:.*\\)?(n[0-9]{8}_|ILSVRC2012_(val|test)_)[0-9]+\.JPEG", re.DOTALL).fullmatch


@dataclass(slots=True)
class Columns:
    """The members of one split, a column each; offsets in bytes.

    Attributes:
        at: where the directory entry lies.
        length: how long it is.
        header_offset: where the local header lies.
        end: before where the data cannot end.
        class_index: of train by folder; else `NO_CLASS`.
        path_hash: hash of the path, to find duplicates.
        names: file names, of val alone: they are joined with labels.
    """

    at: array[int] = field(default_factory=lambda: array("Q"))
    length: array[int] = field(default_factory=lambda: array("I"))
    header_offset: array[int] = field(default_factory=lambda: array("Q"))
    end: array[int] = field(default_factory=lambda: array("Q"))
    size_bytes: array[int] = field(default_factory=lambda: array("Q"))
    class_index: array[int] = field(default_factory=lambda: array("h"))
    path_hash: array[int] = field(default_factory=lambda: array("q"))
    names: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.at)


@dataclass(slots=True, kw_only=True)
class ZipIndex:
    """What a zip of Kaggle's shape holds.

    Attributes:
        prefix: path within the zip of the folder that holds `train`, `val` and `test`.
        splits: members of each split that it holds.
        offsets: of all local headers, ascending, and of the directory.
        ascending: whether the directory is in the order of the offsets, as it usually is.
        headers: hex digest of the central directory.
        holds_targz: it holds no image, but `zipmember.PATCHED_NAME`.
        solution: text of `LOC_val_solution.csv`, or None.
        leftovers: how many files of operating systems are left out.
    """

    prefix: str
    splits: dict[SplitName, Columns]
    offsets: array[int]
    ascending: bool
    headers: str
    holds_targz: bool
    solution: bytes | None
    leftovers: int


def read_index(
    read_at: ReadAt, size: int, archive: str, wnids: tuple[str, ...], check: Callable[[], None] = lambda: None
) -> ZipIndex:
    """Read the whole central directory of a zip.

    Args:
        read_at: reads the zip.
        size: its size in bytes.
        archive: how messages call it.
        wnids: the wnids of all classes, in class-index order.
        check: is called before each piece of the directory is parsed, and may raise to end this.

    Raises:
        ArchiveError: it is damaged, hostile, or not a zip of Kaggle's shape.
    """
    directory = zipindex.find_directory(read_at, size, archive)
    digest = hashlib.blake2b(digest_size=16)
    scan = _Scan(archive, {wnid: index for index, wnid in enumerate(wnids)})
    offsets, ends = array("Q"), array("Q")
    ascending, previous = True, -1

    def seen(piece: bytes) -> None:
        check()
        digest.update(piece)

    for entry in zipindex.iter_entries(read_at, directory, archive, seen=seen):
        offset, end = entry.header_offset, entry.least_end
        scan.add(entry, end)
        offsets.append(offset)
        ends.append(end)
        ascending = ascending and offset > previous
        previous = offset
    if not ascending:
        order = sorted(range(len(offsets)), key=offsets.__getitem__)
        offsets, ends = (array("Q", map(column.__getitem__, order)) for column in (offsets, ends))
    offsets.append(directory.offset)
    for end, following in zip(ends, itertools.islice(offsets, 1, None), strict=True):
        if end > following:
            raise ArchiveError(
                f"{archive}: the members around byte {following:,} overlap each other or the directory: damaged"
            )
    splits = {split: columns for split, columns in scan.splits.items() if columns}
    if not splits and not scan.holds_targz:
        raise ArchiveError(_not_kaggle(scan))
    for columns in splits.values():
        _require_distinct(columns, read_at, archive)
    solution = None if scan.solution is None else _read_small(read_at, scan.solution, archive)
    return ZipIndex(
        prefix=scan.prefix,
        splits=splits,
        offsets=offsets,
        ascending=ascending,
        headers=digest.hexdigest(),
        holds_targz=scan.holds_targz and not splits,
        solution=solution,
        leftovers=scan.leftovers,
    )


def _require_distinct(columns: Columns, read_at: ReadAt, archive: str) -> None:
    """Refuse a path that appears twice: members whose paths have one hash are looked at closely."""
    hashes = sorted(columns.path_hash)
    repeated = {one for one, other in itertools.pairwise(hashes) if one == other}
    paths: set[bytes] = set()
    for row in (row for row, path_hash in enumerate(columns.path_hash) if path_hash in repeated):
        at, length = columns.at[row], columns.length[row]
        entry = next(zipindex.parse_entries(read_at(at, length), at, archive))
        if entry.name in paths:
            raise ArchiveError(f"{archive}: member {zipindex.shown_name(entry)} appears twice: the zip is damaged")
        paths.add(entry.name)


def _read_small(read_at: ReadAt, entry: Entry, archive: str) -> bytes:
    """Read a whole member that is not an image."""
    name = zipindex.shown_name(entry)
    fault = zipindex.member_fault(entry)
    if fault or max(entry.size_bytes, entry.compressed_bytes) > _MAX_SMALL_BYTES:
        raise ArchiveError(f"{archive}: member {name} {fault or 'is too large'}")
    header = read_at(entry.header_offset, zipindex.LOCAL_HEADER_BYTES + len(entry.name))
    data = read_at(zipindex.data_offset(header, entry, archive), entry.compressed_bytes)
    try:
        if entry.method == zipindex.DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, entry.size_bytes + 1)
    except zlib.error as error:
        raise ArchiveError(f"{archive}: member {name} cannot be decompressed ({error}): it is damaged") from None
    if len(data) != entry.size_bytes or zipindex.crc32(data) != entry.crc:
        raise ArchiveError(f"{archive}: member {name} has another CRC-32 than the directory states: it is damaged")
    return data


def _name_bytes(entry: Entry) -> int:
    return len(entry.name)


def _not_kaggle(scan: _Scan) -> str:
    holds = f"it holds {scan.first.decode('utf-8', 'backslashreplace')!r}" if scan.first else "it contains no file"
    return f"{scan.archive}: is a zip file of something else than ImageNet ({holds}): Kaggle's has ILSVRC/Data/CLS-LOC"


class _Scan:
    """Takes the entries of the directory one by one."""

    def __init__(self, archive: str, class_of: Mapping[str, int]) -> None:
        self.archive = archive
        self.prefix = ""
        self.splits: dict[SplitName, Columns] = {"train": Columns(), "val": Columns(), "test": Columns()}
        self.solution: Entry | None = None
        self.holds_targz = False
        self.leftovers = 0
        self.first = b""
        self._others: set[bytes] = set()
        self._class_of = class_of
        self._folders: dict[bytes, tuple[SplitName, int] | None] = {}

    def add(self, entry: Entry, end: int) -> None:
        """Take an entry whose data cannot end before `end`."""
        folder, _, leaf = entry.name.rpartition(b"/")
        try:
            place = self._folders[folder]
        except KeyError:
            place = self._folders[folder] = self._place(folder, entry)
        if not leaf:
            if entry.size_bytes:
                raise ArchiveError(f"{self.archive}: folder {zipindex.shown_name(entry)} has content: it is damaged")
            return
        if place is None:
            self.first = self.first or entry.name
            if leaf == SOLUTION_NAME:
                self._require_first(entry)
                self.solution = entry if self.solution is None else min(self.solution, entry, key=_name_bytes)
            elif leaf == PATCHED_NAME:
                self._require_first(entry)
                self.holds_targz = True
            elif _IMAGE_NAME(leaf):
                raise ArchiveError(
                    f"{self.archive}: image {zipindex.shown_name(entry)} is not where Kaggle's zip has its images, in "
                    "ILSVRC/Data/CLS-LOC/train/<wnid>, val or test: the zip is damaged or re-packed"
                )
            return
        name = zipindex.file_name(leaf, self.archive)
        if is_leftover(name):
            self.leftovers += 1
            return
        split, class_index = place
        fault = zipindex.member_fault(entry)
        if split == "train" and class_index == NO_CLASS:
            fault = "is not in the folder of a class"
        if fault:
            raise ArchiveError(f"{self.archive}: member {zipindex.shown_name(entry)} {fault}")
        columns = self.splits[split]
        columns.at.append(entry.at)
        columns.length.append(entry.length)
        columns.header_offset.append(entry.header_offset)
        columns.end.append(end)
        columns.size_bytes.append(entry.size_bytes)
        columns.class_index.append(class_index)
        columns.path_hash.append(hash(entry.name))
        if split == "val":
            columns.names.append(name)

    def _require_first(self, entry: Entry) -> None:
        if entry.name in self._others:
            raise ArchiveError(f"{self.archive}: member {zipindex.shown_name(entry)} appears twice: the zip is damaged")
        self._others.add(entry.name)

    def _place(self, folder: bytes, entry: Entry) -> tuple[SplitName, int] | None:
        """Return split and class index of the files in a folder; None: it is none that holds images."""
        path = folder.decode("utf-8", "replace")
        prefix = kaggle_prefix(path)
        if prefix is None:
            return None
        if self.prefix not in ("", prefix):
            raise ArchiveError(f"{self.archive}: holds both {self.prefix}/ and {prefix}/: it is damaged or re-packed")
        self.prefix = prefix
        parts = path.removeprefix(prefix + "/").split("/")
        if any(is_leftover(part) for part in parts):
            return None
        if parts == [""] or (parts[0] == "train" and len(parts) == 1):
            return "train", NO_CLASS
        if len(parts) == 1 and parts[0] in ("val", "test"):
            return ("val" if parts[0] == "val" else "test"), NO_CLASS
        if parts[0] == "train" and len(parts) == 2 and parts[1] in self._class_of:
            return "train", self._class_of[parts[1]]
        raise ArchiveError(
            f"{self.archive}: member {zipindex.shown_name(entry)} is not in {prefix}/train/<wnid>, val or test, "
            "or its wnid is not a class of ImageNet-1K"
        )
