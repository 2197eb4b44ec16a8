"""Rows of path, class index, wnid, bytes and digest: one a line, tab-separated, sorted by path, below one header.

Test images have no class: class index -1, wnid `-`, and a path without a class folder.

Rows stay bytes wherever possible: a train manifest has 1.28 million of them (96 MB). A tab sorts before every
character that a name may hold, so rows sorted as bytes are sorted by path, and the rows of a class folder stand
together.
"""

from __future__ import annotations

import heapq
import io
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import xxhash

from imagenet_unpack.errors import CheckError
from imagenet_unpack.model import SplitName

HEADER = b"path\tclass_index\twnid\tbytes\txxh3_64\n"
_FIELDS = rb"(test/|[^/\t\n]+/[^/\t\n]+/)([^/\t\n]+)\t(-1|[0-9]{1,9})\t(-|n[0-9]{8})\t([0-9]{1,18})\t([0-9a-f]{16}|-)"
_ROW = re.compile(_FIELDS + rb"\n?")
_ROWS = re.compile(rb"^" + _FIELDS + rb"\n", re.MULTILINE)
_LOOK_BYTES = 1 << 20
_HOP_BYTES = 64 << 10  # about the rows of a class
_MAX_OPEN_FILES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One image: its path relative to the target, its class, its size and the xxh3-64 digest of its bytes, if known."""

    path: str
    class_index: int
    wnid: str
    size_bytes: int
    digest: int | None


def manifest_name(split: SplitName) -> str:
    """Return the name of a split's manifest in the target."""
    return f"{split}.manifest.tsv"


def find(target: Path, split: SplitName) -> Path:
    """Return where the manifest of a split is: in the target, or in the split's folder (images made in place)."""
    path = target / manifest_name(split)
    inside = target / split / path.name
    return inside if inside.exists() and not path.exists() else path


def row(path: str, class_index: int, wnid: str, size_bytes: int, digest: int | None) -> bytes:
    """Return one line; called once an image, so it trusts what it is given.

    The digest is None, and `-` in the line, in an image whose bytes nobody has read.
    """
    if digest is None:
        return f"{path}\t{class_index}\t{wnid}\t{size_bytes}\t-\n".encode()
    return f"{path}\t{class_index}\t{wnid}\t{size_bytes}\t{digest:016x}\n".encode()


def parse_row(line: bytes) -> Row:
    """Read one line, with its newline or without.

    Raises:
        CheckError: the line is not a row of a manifest.
    """
    match = _ROW.fullmatch(line)
    if match is None:
        raise CheckError(f"this is not a row of a manifest: {_shown(line)}")
    folder, name, class_index, wnid, size_bytes, digest = match.groups()
    try:
        text = (folder + name).decode()
    except UnicodeDecodeError as error:
        raise CheckError(f"this row of a manifest is not UTF-8: {_shown(line)}") from error
    return Row(
        path=text,
        class_index=int(class_index),
        wnid=wnid.decode(),
        size_bytes=int(size_bytes),
        digest=None if digest == b"-" else int(digest, 16),
    )


def rows(path: Path) -> Iterator[bytes]:
    """Yield the lines of a manifest below its header.

    Raises:
        CheckError: the header is not a manifest's.
    """
    with open(path, "rb") as file:
        if file.readline(len(HEADER)) != HEADER:
            raise CheckError(_bad_header(path))
        yield from file


def part_streams(parts: Iterable[Path]) -> list[Iterator[bytes]]:
    """Chain manifest parts (sorted, without a header) into as few sorted streams as possible, for `write`.

    Parts of train do not overlap, so a thousand of them become one stream with one open file, and a plain copy.
    """
    spans = []
    for path in parts:
        data = path.read_bytes()
        if data:
            spans.append((data[: data.find(b"\n") + 1], data[data.rfind(b"\n", 0, -1) + 1 :], path))
    ends: list[bytes] = []
    chains: list[list[Path]] = []
    for first, last, path in sorted(spans):
        number = next((number for number, end in enumerate(ends) if end < first), len(ends))
        if number == len(ends):
            ends.append(last)
            chains.append([path])
        else:
            ends[number] = last
            chains[number].append(path)
    if len(chains) > _MAX_OPEN_FILES:  # of a shuffled archive: every part has rows of every class
        return [iter(io.BytesIO(b"".join(path.read_bytes() for path in paths))) for paths in chains]
    return [_lines(paths) for paths in chains]


def with_class_indices(lines: Iterable[bytes], class_indices: Mapping[str, int]) -> Iterator[bytes]:
    """Yield rows with the class indices of their wnids."""
    encoded = {wnid.encode(): b"%d" % index for wnid, index in class_indices.items()}
    for line in lines:
        path, _, wnid, rest = line.split(b"\t", 3)
        yield b"\t".join((path, encoded[wnid], wnid, rest))


def _lines(paths: Iterable[Path]) -> Iterator[bytes]:
    for path in paths:
        with open(path, "rb") as file:
            yield from file


def write(path: Path, streams: Iterable[Iterable[bytes]]) -> None:
    """Write one manifest from sorted streams of rows: of parts (`part_streams`) and of other manifests (`rows`)."""
    with open(path, "wb") as file:
        file.write(HEADER)
        file.writelines(heapq.merge(*streams))


def file_digest(path: Path) -> str:
    """Return the xxh3-64 of a whole manifest, as the record of a published split keeps it."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while data := file.read(_LOOK_BYTES):
            digest.update(data)
    return digest.hexdigest()


def count_rows(path: Path) -> int:
    """Return the number of images that a manifest lists."""
    with open(path, "rb") as file:
        lines = sum(piece.count(b"\n") for piece in iter(lambda: file.read(_LOOK_BYTES), b""))
    return max(0, lines - 1)


def class_ranges(path: Path, parts: int) -> list[tuple[int, int]]:
    """Cut a manifest into about `parts` byte ranges of about one size that split no class folder.

    It looks at the places of the cuts alone, so that the workers can share the reading.

    Raises:
        CheckError: the header is not a manifest's.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.readline(len(HEADER)) != HEADER:
            raise CheckError(_bad_header(path))
        if size == len(HEADER):
            return []
        with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as view:
            guesses = (len(HEADER) + (size - len(HEADER)) * number // parts for number in range(1, parts))
            cuts = sorted({len(HEADER), size, *(_next_folder(view, guess) for guess in guesses)})
    return list(pairwise(cuts))


def _next_folder(view: mmap.mmap, offset: int) -> int:
    """Return where the next class folder begins behind `offset`, or the end of the manifest."""
    start = view.find(b"\n", offset) + 1
    if not start:
        return len(view)
    folder = view[start : view.rfind(b"/", start, view.find(b"\t", start)) + 1]
    # The rows of a folder stand together: its last row in reach is found backwards.
    while (row_start := view.rfind(b"\n" + folder, start, start + _HOP_BYTES)) >= 0:
        start = row_start + 1
    return view.find(b"\n", start) + 1 or len(view)


def read_groups(path: Path, start: int, end: int) -> Iterator[tuple[str, list[bytes]]]:
    """Yield class folder and rows of each class in a range that `class_ranges` returned.

    Raises:
        CheckError: rows are damaged or not sorted by path.
    """
    with open(path, "rb") as file:
        file.seek(start)
        left, folder = end - start, b""
        group: list[bytes] = []
        for line in file:
            if left <= 0:
                break
            left -= len(line)
            if not group or not line.startswith(folder):
                if group:
                    yield _folder_name(folder, path), group
                before, folder = folder, line[: line.rfind(b"/", 0, line.find(b"\t")) + 1]
                if folder <= before:
                    raise damage_of(path)
                group = []
            elif line <= group[-1]:
                raise damage_of(path)
            group.append(line)
        if group:
            yield _folder_name(folder, path), group


def read_files(path: Path, rows: list[bytes]) -> dict[bytes, tuple[bytes, bytes, bytes, bytes]]:
    """Return class index, wnid, size and digest by file name, as given in the rows of one class of `path`.

    Raises:
        CheckError: a row is damaged or names a file a second time.
    """
    text = b"".join(rows)
    files = {name: (index, wnid, size, digest) for _, name, index, wnid, size, digest in _ROWS.findall(text)}
    if len(files) != len(rows) or not _is_utf8(text):
        raise damage_of(path)
    return files


def damage_of(path: Path) -> CheckError:
    """Make the error that names the first damaged line; slow, as it is rarely needed."""
    split = path.name.partition(".")[0].encode()
    before = b""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                if line != HEADER:
                    return CheckError(_bad_header(path))
                continue
            if not _ROWS.fullmatch(line) or not line.startswith(split + b"/") or not _is_utf8(line):
                return CheckError(f"{path}: line {number} is not a row of a manifest: {_shown(line)}")
            name = line.partition(b"\t")[0]
            if name <= before:
                return CheckError(f"{path}: line {number} is not in its place, rows are sorted by path: {_shown(line)}")
            before = name
    return CheckError(f"{path}: it changed while it was read: run the same command again")


def _folder_name(prefix: bytes, path: Path) -> str:
    if not prefix.startswith(path.name.partition(".")[0].encode() + b"/") or not _is_utf8(prefix):
        raise damage_of(path)
    return prefix.split(b"/")[1].decode()


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _bad_header(path: Path) -> str:
    return f"{path}: its first line is not the header of a manifest: it is damaged, or not this program's"


def _shown(line: bytes) -> str:
    return repr(line[:80])[1:]
