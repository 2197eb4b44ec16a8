"""Check whether an image is whole: its tables, its record, its manifests and the published facts.

Everything is read by `sources.squashfs`, which shares no code with what writes images. Without `deep` no byte of an
image file is read: tables, manifests, links and counts are compared. With it every image is read and compared with its
digest where the manifest has one, and archives that were official with their published SHA-256.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.errors import TargetError, reason
from imagenet_unpack.host import pool
from imagenet_unpack.model import Problem, SplitCheck, SplitName
from imagenet_unpack.reporter import NullReporter, Reporter
from imagenet_unpack.sources.imagerecord import RECORD_BYTES, TAR_BLOCK_BYTES, HeldArchive, ImageRecord, read_record
from imagenet_unpack.sources.squashfs import File, Folder, Image
from imagenet_unpack.sources.squashfs_tables import MAGIC, SUPERBLOCK_BYTES, ImageError

_READ_BYTES = 4 << 20
_UNKNOWN = (0, 0, b"-")
_HEADER = b"path\tclass_index\twnid\tbytes\txxh3_64"
_CHECKSUM = slice(148, 156)

_Entry = tuple[str, str, int, int, bytes]
"""Class folder, path, offset in the image, size, digest in hex or `-`."""


@dataclass(slots=True)
class _Split:
    """What is found of a split."""

    name: SplitName
    classes: int
    images: int
    problems: list[Problem]


def check_image(path: Path, *, deep: bool, workers: int, reporter: Reporter | None = None) -> tuple[SplitCheck, ...]:
    """Check an image.

    Args:
        path: the file.
        deep: read every byte of the images too.
        workers: processes to share that.
        reporter: shows the progress.

    Raises:
        TargetError: the file is not an image, nor what is left of one.
    """
    reporter = reporter or NullReporter()
    record: ImageRecord | None = None
    damage = ""
    try:
        record = read_record(path)
    except TargetError as error:
        damage = str(error)
    with open(path, "rb") as file:
        is_image = file.read(len(MAGIC)) == MAGIC
    if record is None and not damage:
        if not is_image:
            raise TargetError(
                f"{path}: is neither a folder nor an image: give the folder that holds train/, or an image"
            )
        damage = f"{path}: the record at its end is missing: it is cut off, or another program made it"
    splits = _splits_of(record)
    found = {split: _Split(split, 0, 0, []) for split in splits}
    try:
        if record is None:
            raise ImageError(damage)
        nbytes = sum(size for _, _, size in record.splits.values()) if deep else None
        reporter.phase("checking", nbytes, sum(images for _, images, _ in record.splits.values()))
        with Image(path) as image:
            _compare_with_record(image, record)
            classes = _check_tree(image, record, found)
            if deep:
                _check_bytes(path, classes, found, workers, reporter)
            else:
                for entries in classes:
                    reporter.advance(nbytes=0, images=len(entries), shards=0)
    except ImageError as error:
        text = str(error).removeprefix(f"{path}: ")
        found[splits[0]].problems.append(
            Problem(class_name="", kind="unreadable", path=path.name, expected="a whole image", found=text)
        )
    else:
        if deep:
            for archive in record.archives:
                _check_archive(path, record, archive, found, reporter)
    return tuple(
        SplitCheck(
            split=each.name,
            classes=each.classes,
            images=each.images,
            basis="image",
            problems=tuple(sorted(each.problems, key=lambda problem: (problem.class_name, problem.path or ""))),
        )
        for each in found.values()
    )


def _splits_of(record: ImageRecord | None) -> tuple[SplitName, ...]:
    known: tuple[SplitName, ...] = ("train", "val", "test")
    present = tuple(split for split in known if record is not None and split in record.splits)
    return present or ("train",)


def _compare_with_record(image: Image, record: ImageRecord) -> None:
    """Compare superblock, size and tables with what the record says of them.

    Raises:
        ImageError: they differ.
    """
    if image.size_bytes != record.end + RECORD_BYTES:
        raise ImageError(f"{image.size_bytes:,} bytes, {record.end + RECORD_BYTES:,} expected: cut off or extended")
    head = image.pread(TAR_BLOCK_BYTES, 0)
    if head[:SUPERBLOCK_BYTES] != record.superblock:
        raise ImageError("its superblock is not the one that was written")
    if record.original is not None:
        expected = bytearray(record.original.first_block)
        expected[:SUPERBLOCK_BYTES] = record.superblock
        expected[_CHECKSUM] = b" " * 8
        expected[_CHECKSUM] = b"%06o\0 " % sum(expected)
        if head != expected:
            raise ImageError("its first block is not the one that was written")
    digest = xxhash.xxh3_64()
    at = record.start
    while at < record.end:
        data = image.pread(min(_READ_BYTES, record.end - at), at)
        if not data:
            raise ImageError("its tables cannot be read")
        digest.update(data)
        at += len(data)
    if digest.hexdigest() != record.digest:
        raise ImageError("its tables are not those that were written: damaged")


def _check_tree(image: Image, record: ImageRecord, found: dict[SplitName, _Split]) -> Iterator[list[_Entry]]:
    """Compare the tree with the manifests in it, the record and the published counts; yield the images of each class.

    Raises:
        ImageError: the tree is damaged.
    """
    bare = record.method == "in-place"
    manifests: dict[str, Iterator[tuple[bytes, dict[bytes, tuple[int, int, bytes]]]]] = {}
    folders: set[bytes] = set()
    links: list[tuple[bytes, bytes]] = []
    for folder in image.walk():
        where = b"/".join(folder.path)
        folders.add(where)
        links += [(b"/".join((*folder.path, name)), target) for name, target in folder.links]
        if not folder.path:
            for file in folder.files:
                split = file.name.decode("utf-8", "replace").removesuffix(".manifest.tsv")
                if split in found and file.name.endswith(b".manifest.tsv"):
                    manifests[split] = _groups(image, file, split)
        elif folder.path[0].startswith(b"by-"):
            continue
        holder = _split_of(folder, found, bare=bare)
        files = [file for file in folder.files if folder.path or not file.name.endswith(b".manifest.tsv")]
        if holder is None or not files:
            continue
        name = folder.path[-1].decode("utf-8", "replace") if len(folder.path) > (0 if bare else 1) else ""
        if holder.name not in manifests:
            raise ImageError(f"the manifest of {holder.name} is missing")
        prefix, rows = next(manifests[holder.name], (b"", {}))
        expected_prefix = f"{holder.name}/{name}/".encode() if name else f"{holder.name}/".encode()
        if prefix != expected_prefix:
            raise ImageError(f"the manifest of {holder.name} does not list {expected_prefix.decode()}")
        _compare_class(record, holder, name, files, rows, prefix.decode())
        yield [
            (name, prefix.decode() + _shown(file.name), file.start, file.size_bytes, rows.get(file.name, _UNKNOWN)[2])
            for file in files
        ]
    for split, each in found.items():
        if next(manifests.get(split, iter(())), None) is not None:
            raise ImageError(f"the manifest of {split} lists more than there is")
        classes, images, _ = record.splits[split]
        if (each.classes, each.images) != (classes, images):
            each.problems.append(Problem(class_name="", kind="count", expected=images, found=each.images, path=split))
    _check_links(links, folders, found)


def _split_of(folder: Folder, found: dict[SplitName, _Split], *, bare: bool) -> _Split | None:
    if bare:
        return next(iter(found.values()))
    if not folder.path:
        return None
    return {split.encode(): each for split, each in found.items()}.get(folder.path[0])


def _compare_class(
    record: ImageRecord,
    split: _Split,
    name: str,
    files: list[File],
    rows: dict[bytes, tuple[int, int, bytes]],
    prefix: str,
) -> None:
    split.classes += split.name != "test"  # test images lie in no class
    split.images += len(files)
    sizes = {file.name: file.size_bytes for file in files}
    for missing in rows.keys() - sizes.keys():
        split.problems.append(Problem(class_name=name, kind="missing", path=prefix + _shown(missing)))
    for extra in sizes.keys() - rows.keys():
        split.problems.append(Problem(class_name=name, kind="extra", path=prefix + _shown(extra)))
    for each, (_, size, _) in rows.items():
        if sizes.get(each, size) != size:
            path = prefix + _shown(each)
            split.problems.append(Problem(class_name=name, kind="size", path=path, expected=size, found=sizes[each]))
    if split.name in record.official and split.name != "test" and rows:
        index = next(iter(rows.values()))[0]
        train = split.name == "train"
        expected = ilsvrc2012.train_images(index) if train else ilsvrc2012.VAL_IMAGES_PER_CLASS
        if len(files) != expected:
            split.problems.append(Problem(class_name=name, kind="count", expected=expected, found=len(files)))


def _groups(image: Image, file: File, split: str) -> Iterator[tuple[bytes, dict[bytes, tuple[int, int, bytes]]]]:
    """Yield the folder of each class that a manifest in the image lists, with class index, size and digest by name."""
    damaged = ImageError(f"the manifest of {split} is damaged")
    folder = b""
    rows: dict[bytes, tuple[int, int, bytes]] = {}
    for number, line in enumerate(_lines(image, file)):
        if number == 0:
            if line != _HEADER:
                raise damaged
            continue
        fields = line.split(b"\t")
        before, slash, name = fields[0].rpartition(b"/")
        if len(fields) != 5 or not slash:
            raise damaged
        if before + slash != folder:
            if rows:
                yield folder, rows
            folder, rows = before + slash, {}
        try:
            rows[name] = int(fields[1]), int(fields[3]), fields[4]
        except ValueError:
            raise damaged from None
    if rows:
        yield folder, rows


def _lines(image: Image, file: File) -> Iterator[bytes]:
    left = b""
    for piece in image.read(file):
        *lines, left = (left + piece).split(b"\n")
        yield from lines
    if left:
        raise ImageError(f"{_shown(file.name)} does not end with a line")


def _check_links(links: list[tuple[bytes, bytes]], folders: set[bytes], found: dict[SplitName, _Split]) -> None:
    first = next(iter(found.values()))
    for path, target in links:
        if os.path.normpath(os.path.join(os.path.dirname(path), target)) not in folders:
            text = f"a link to {_shown(target)}"
            first.problems.append(
                Problem(class_name="", kind="missing", path=_shown(path), expected="a class folder", found=text)
            )


def _check_bytes(
    path: Path, classes: Iterator[list[_Entry]], found: dict[SplitName, _Split], workers: int, reporter: Reporter
) -> None:
    """Read every image, and compare it with its digest if that is known."""
    read = functools.partial(_read_entries, str(path))
    results = pool.map_unordered(read, classes, workers) if workers > 1 else map(read, classes)
    for images, nbytes, problems in results:
        for split, problem in problems:
            found[split].problems.append(problem)
        reporter.advance(nbytes=nbytes, images=images, shards=0)


def _read_entries(path: str, entries: list[_Entry]) -> tuple[int, int, list[tuple[SplitName, Problem]]]:
    """Read some images; return how many, their bytes, and what is wrong with them."""
    problems: list[tuple[SplitName, Problem]] = []
    total = 0
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for folder, name, start, size, digest in entries:
            split: SplitName = name.split("/")[0]  # type: ignore[assignment]
            try:
                found = _digest(fd, start, size)
            except OSError as error:
                problems.append((split, Problem(class_name=folder, kind="unreadable", path=name, found=reason(error))))
                continue
            expected = digest.decode("ascii", "replace")
            if expected not in ("-", found):
                problem = Problem(class_name=folder, kind="digest", path=name, expected=expected, found=found)
                problems.append((split, problem))
            total += size
    finally:
        os.close(fd)
    return len(entries), total, problems


def _digest(fd: int, start: int, size: int) -> str:
    digest = xxhash.xxh3_64()
    while size:
        data = os.pread(fd, min(size, _READ_BYTES), start)
        if not data:
            return "nothing behind the end of the file"
        digest.update(data)
        start, size = start + len(data), size - len(data)
    return digest.hexdigest()


def _check_archive(
    path: Path, record: ImageRecord, archive: HeldArchive, found: dict[SplitName, _Split], reporter: Reporter
) -> None:
    """Compare an official archive that lies in the image with its published digest."""
    published = {"train": ilsvrc2012.TRAIN_ARCHIVE, "val": ilsvrc2012.VAL_ARCHIVE}.get(archive.split)
    if published is None or published.sha256 is None:
        return
    reporter.phase(f"comparing {published.name} with its published digest", archive.size_bytes, None)
    digest = hashlib.sha256()
    at, end = archive.offset, archive.offset + archive.size_bytes
    with open(path, "rb", buffering=0) as file:
        file.seek(at)
        while at < end:
            data = file.read(min(_READ_BYTES, end - at))
            if not data:
                break
            digest.update(data if record.original is None else record.original.restore(data, at))
            reporter.advance(nbytes=len(data), images=0, shards=0)
            at += len(data)
    if digest.hexdigest() != published.sha256:
        split = next(split for split in found if split == archive.split)
        found[split].problems.append(
            Problem(
                class_name="",
                kind="digest",
                path=published.name,
                expected=published.sha256,
                found=digest.hexdigest(),
            )
        )


def _shown(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
