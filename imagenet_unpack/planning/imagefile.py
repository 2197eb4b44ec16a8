"""Plans from an image that this program made: its tables say where each file lies, and files are cut into runs.

A class whose files lie together, as they do in an image of the train archive, is a shard of its own; all others are
taken in the order of their offsets, in runs of about 64 MiB.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from imagenet_unpack.errors import ArchiveError, reason
from imagenet_unpack.model import (
    LAYOUTS,
    TEST_CLASS,
    ArchiveId,
    ClassRef,
    Layout,
    Shard,
    SplitName,
    SplitPlan,
    class_refs,
    folder_name,
)
from imagenet_unpack.planning.common import (
    RUN_BYTES,
    chosen_classes,
    count_notes,
    identity,
    largest_first,
    lines_digest,
)
from imagenet_unpack.sources.archive import opened
from imagenet_unpack.sources.imagerun import ImageRun, record_of, verify_tables
from imagenet_unpack.sources.members import name_fault
from imagenet_unpack.sources.squashfs import File, Folder, Image
from imagenet_unpack.sources.squashfs_tables import ImageError

_WNID = re.compile(rb"n[0-9]{8}")
_GAP_BYTES = 4096  # a tar header, the filling up before it and, now and then, a long name


@dataclass(slots=True)
class _Scattered:
    """Columns of the files that do not lie together with those of their class."""

    class_indices: array[int] = field(default_factory=lambda: array("i"))
    names: list[bytes] = field(default_factory=list)
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("Q"))
    mtimes: array[int] = field(default_factory=lambda: array("I"))

    def add(self, class_index: int, files: Sequence[File]) -> None:
        """Add files of a class."""
        self.class_indices.extend([class_index] * len(files))
        self.names += [each.name for each in files]
        self.offsets.extend(each.start for each in files)
        self.sizes.extend(each.size_bytes for each in files)
        self.mtimes.extend(each.mtime_s for each in files)


def plan_image(
    path: Path,
    split: SplitName,
    refs: tuple[ClassRef, ...] | None,
    asked: tuple[int, ...] | None,
    layout: Layout,
    *,
    run_bytes: int = RUN_BYTES,
) -> SplitPlan:
    """Plan a split from an image.

    Args:
        path: the image.
        split: which split.
        refs: all classes there are; None: the image's folders, which are wnids.
        asked: the class indices asked for, or None for every class that has an image.
        layout: names of the class folders to be made.
        run_bytes: about how long a run of files is that makes a shard.

    Raises:
        ArchiveError: the image is damaged, not of this program's making, or has not what is asked for.
    """
    record = record_of(path)
    verify_tables(path, record)
    with opened(path) as (stat, _):
        file = identity(path, stat, "", official=False)
    headers = hashlib.blake2b(digest_size=16)
    counts: Counter[int] = Counter()
    shards: list[Shard] = []
    scattered = _Scattered()
    content_bytes = 0
    by_folder: dict[bytes, ClassRef] = {}
    for folder in _folders(path, split):
        if len(folder.path) < 2:
            if refs is None:
                refs = class_refs(tuple(name.decode() for name in folder.folders if _WNID.fullmatch(name)), layout)
            by_folder = _class_folders(path, folder, refs or (), record.layouts)
            if split != "test":
                continue
        ref = TEST_CLASS if len(folder.path) < 2 else by_folder[folder.path[1]]
        _require_names(path, folder)
        files = sorted(folder.files, key=lambda each: each.start)
        counts[ref.index] = len(files)
        for each in files:
            headers.update(b"%s\0%s\0%d %d\n" % (ref.wnid.encode(), each.name, each.start, each.size_bytes))
        if asked is not None and ref.index not in asked and split != "test":
            continue
        content_bytes += sum(each.size_bytes for each in files)
        if split == "train" and _lie_together(files):
            shards.append(_shard(ref.wnid, split, file, (ref,), _class_run(files)))
        else:
            scattered.add(ref.index, files)
    classes: tuple[ClassRef, ...] = (TEST_CLASS,)
    if split != "test":
        classes = chosen_classes(counts.keys(), asked, refs or (), str(path))
    by_index = {ref.index: ref for ref in classes}
    shards += [
        _shard(f"{split}-{number:05d}", split, file, shard_classes, run)
        for number, (shard_classes, run) in enumerate(_runs(scattered, by_index, run_bytes))
    ]
    archive = replace(file, headers=headers.hexdigest())
    return SplitPlan(
        split=split,
        archive=archive,
        layout=layout,
        classes=classes,
        shards=largest_first(replace(shard, archive=archive) for shard in shards),
        images=sum(counts[ref.index] for ref in classes),
        images_exact=True,
        content_bytes=content_bytes,
        labels_digest=lines_digest(f"{ref.index} {ref.wnid}" for ref in refs or ()),
        notes=count_notes(split, counts, str(path)),
    )


def _folders(path: Path, split: SplitName) -> Iterator[Folder]:
    """Yield the folder of a split and then its class folders."""
    found = False
    try:
        with Image(path) as image:
            for folder in image.walk(only=split.encode()):
                if folder.path:
                    found = True
                    yield folder
    except ImageError as error:
        raise ArchiveError(f"{path}: the image is damaged: {error}") from error
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be read: {reason(error)}") from error
    if not found:
        raise ArchiveError(f"{path}: the image is damaged: it has no folder {split}/")


def _class_folders(
    path: Path, folder: Folder, refs: Sequence[ClassRef], layouts: Sequence[str]
) -> dict[bytes, ClassRef]:
    """Return the class of each folder in that of a split; `layouts` begins with the one that names them."""
    test = folder.path == (b"test",)
    if bool(folder.files) != test or bool(folder.folders) == test:
        raise ArchiveError(f"{path}: the image is damaged: {folder.path[0].decode()}/ holds what it should not")
    layout: Layout = next((each for each in LAYOUTS if layouts and each == layouts[0]), "index")
    known = {folder_name(ref.index, ref.wnid, layout).encode(): ref for ref in refs}
    unknown = [name for name in folder.folders if name not in known]
    if unknown:
        raise ArchiveError(f"{path}: {unknown[0].decode('utf-8', 'backslashreplace')!r} is no folder of a known class")
    return known


def _require_names(path: Path, folder: Folder) -> None:
    for file in folder.files:
        fault = name_fault(file.name.decode("utf-8", "surrogateescape"))
        if fault or file.packed is not None:
            raise ArchiveError(f"{path}: {file.name!r} is refused: {fault or 'it is compressed'}")


def _lie_together(files: Sequence[File]) -> bool:
    return all(0 <= other.start - one.start - one.size_bytes <= _GAP_BYTES for one, other in pairwise(files))


def _class_run(files: Sequence[File]) -> ImageRun:
    return ImageRun(
        positions=array("H", bytes(2 * len(files))),
        names=b"\0".join(each.name for each in files),
        offsets=array("Q", (each.start for each in files)),
        sizes=array("Q", (each.size_bytes for each in files)),
        mtimes=array("I", (each.mtime_s for each in files)),
    )


def _runs(
    scattered: _Scattered, by_index: dict[int, ClassRef], run_bytes: int
) -> Iterator[tuple[tuple[ClassRef, ...], ImageRun]]:
    """Cut files into runs, in the order of their offsets."""
    row: list[int] = []
    first = 0
    for number in sorted(range(len(scattered.names)), key=scattered.offsets.__getitem__):
        end = scattered.offsets[number] + scattered.sizes[number]
        if row and end - first > run_bytes:
            yield _run(scattered, row, by_index)
            row = []
        if not row:
            first = scattered.offsets[number]
        row.append(number)
    if row:
        yield _run(scattered, row, by_index)


def _run(
    scattered: _Scattered, rows: Sequence[int], by_index: dict[int, ClassRef]
) -> tuple[tuple[ClassRef, ...], ImageRun]:
    indices = [scattered.class_indices[row] for row in rows]
    present = sorted(set(indices))
    position = {index: at for at, index in enumerate(present)}
    run = ImageRun(
        positions=array("H", (position[index] for index in indices)),
        names=b"\0".join(scattered.names[row] for row in rows),
        offsets=array("Q", (scattered.offsets[row] for row in rows)),
        sizes=array("Q", (scattered.sizes[row] for row in rows)),
        mtimes=array("I", (scattered.mtimes[row] for row in rows)),
    )
    return tuple(by_index[index] for index in present), run


def _shard(name: str, split: SplitName, archive: ArchiveId, classes: tuple[ClassRef, ...], run: ImageRun) -> Shard:
    return Shard(
        id=name,
        split=split,
        archive=archive,
        offset=run.offsets[0],
        end=max(offset + size for offset, size in zip(run.offsets, run.sizes, strict=True)),
        classes=classes,
        format="image",
        payload=run,
    )
