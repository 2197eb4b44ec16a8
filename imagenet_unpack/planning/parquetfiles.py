"""Plans from parquet files: names and labels of every row group are read, images are not."""

from __future__ import annotations

import hashlib
import itertools
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from imagenet_unpack.dataset.labels import ValLabels
from imagenet_unpack.dataset.names import split_of_name, train_wnid
from imagenet_unpack.errors import ArchiveError, LabelError, MissingArchiveError
from imagenet_unpack.model import TEST_CLASS, ArchiveId, ClassRef, Layout, Shard, SplitName, SplitPlan
from imagenet_unpack.planning.common import (
    RUN_BYTES,
    chosen_classes,
    count_notes,
    identity,
    label_notes,
    largest_first,
    lines_digest,
)
from imagenet_unpack.sources.archive import opened
from imagenet_unpack.sources.parquet import ParquetFile, ParquetRun, footer, something_else

_PIECE = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """A row group.

    Attributes:
        offset: about where it begins in the file; the footer's sizes of columns are not looked at.
        end: about where it ends.
        content_bytes: size of its columns, decompressed.
        indices: class index of each row.
    """

    archive: ArchiveId
    number: int
    offset: int
    end: int
    content_bytes: int
    indices: array[int]


def plan_parquet(
    paths: Sequence[Path],
    split: SplitName,
    refs: tuple[ClassRef, ...],
    asked: tuple[int, ...] | None,
    layout: Layout,
    *,
    labels: ValLabels | None = None,
    run_bytes: int = RUN_BYTES,
    check: Callable[[], None] = lambda: None,
) -> SplitPlan:
    """Plan one split from the parquet files that make it together.

    Args:
        paths: the files, in any order.
        split: which split they are.
        refs: all classes there are.
        asked: the indices asked for, or None for every class that has an image in the files.
        layout: names of the class folders.
        labels: of validation images that the user gave: those in the files must not contradict them.
        run_bytes: about how long the run of row groups of a shard is.
        check: is called before each row group is read, and may raise to end that.

    Raises:
        MissingArchiveError: one of several numbered files is missing.
        ArchiveError: a file is damaged, hostile or not one of ImageNet-1K, or a class asked for is not there.
        LabelError: a label contradicts the name of its image.
    """
    paths = sorted(paths, key=lambda path: path.name)
    _require_all_pieces(paths)
    files: list[ArchiveId] = []
    groups: list[_Group] = []
    hashes = array("q")
    val_labels: dict[str, int] = {}
    headers = hashlib.blake2b(digest_size=16)
    for path in paths:
        archive = _file_identity(path)
        headers.update(f"{path.name} {archive.size_bytes} {archive.headers}\n".encode())
        files.append(archive)
        with closing(ParquetFile(str(path))) as file:
            sizes = [file.row_group(number).size_bytes for number in range(file.row_groups)]
            ends = [archive.size_bytes * done // max(1, sum(sizes)) for done in itertools.accumulate(sizes, initial=0)]
            for number, size_bytes in enumerate(sizes):
                check()
                rows = file.names(number)
                if number == 0 and rows and not any(split_of_name(name) for name, _, _ in rows):
                    raise something_else(str(path), rows[0][0])
                hashes.extend(hash((name, label)) for name, _, label in rows)
                if split == "val":
                    val_labels.update((name, label) for name, _, label in rows)
                    _require_agreement(path, rows, labels)
                group = _Group(
                    archive=archive,
                    number=number,
                    offset=ends[number],
                    end=ends[number + 1],
                    content_bytes=size_bytes,
                    indices=array("h", [_index(path, split, refs, *row) for row in rows]),
                )
                groups.append(group)
    where = str(paths[0]) if len(paths) == 1 else str(paths[0].parent)
    _require_distinct(paths, hashes, check)
    present = {index for group in groups for index in group.indices}
    if not present:
        raise ArchiveError(f"{where}: contains no images")
    classes = (TEST_CLASS,) if split == "test" else chosen_classes(present, asked, refs, where)
    by_index = {ref.index: ref for ref in classes}
    counts = [sum(index in by_index for index in group.indices) for group in groups]
    labels_digest = lines_digest(f"{ref.index} {ref.wnid}" for ref in refs)
    notes: tuple[str, ...] = ()
    if split == "val":
        labels_digest = lines_digest(sorted(f"{name} {label}" for name, label in val_labels.items()))
        notes = label_notes(list(val_labels), ValLabels(by_name=val_labels, source=where))
    notes += count_notes(split, Counter(itertools.chain.from_iterable(group.indices for group in groups)), where)
    return SplitPlan(
        split=split,
        archive=ArchiveId(
            path=where,
            size_bytes=sum(file.size_bytes for file in files),
            mtime_ns=sum(file.mtime_ns for file in files),
            headers=headers.hexdigest(),
            official=False,
        ),
        layout=layout,
        classes=classes,
        shards=largest_first(_shards(split, groups, counts, by_index, run_bytes)),
        images=sum(counts),
        images_exact=True,
        content_bytes=sum(
            group.content_bytes * count // max(1, len(group.indices))
            for group, count in zip(groups, counts, strict=True)
        ),
        labels_digest=labels_digest,
        files=tuple(files),
        notes=notes,
    )


def _shards(
    split: SplitName, groups: list[_Group], counts: list[int], by_index: dict[int, ClassRef], run_bytes: int
) -> Iterator[Shard]:
    runs: list[list[tuple[_Group, int]]] = []
    for group, count in zip(groups, counts, strict=True):
        if not count:
            continue
        first = runs[-1][0][0] if runs else None
        if first is None or first.archive is not group.archive or group.end - first.offset > run_bytes:
            runs.append([])
        runs[-1].append((group, count))
    for number, run in enumerate(runs):
        present = {index for group, _ in run for index in group.indices}
        yield Shard(
            id=f"{split}-{number:05d}",
            split=split,
            archive=run[0][0].archive,
            offset=run[0][0].offset,
            end=max(group.end for group, _ in run),
            classes=tuple(by_index[index] for index in sorted(present & by_index.keys())),
            format="parquet",
            payload=ParquetRun(
                row_groups=tuple(group.number for group, _ in run), images=sum(count for _, count in run)
            ),
        )


def _index(
    path: Path, split: SplitName, refs: tuple[ClassRef, ...], name: str, appended: str | None, label: int
) -> int:
    """Return the class index of an image; what its name says must agree with its label and with the split."""
    named = split_of_name(name)
    if named not in (None, split):
        raise ArchiveError(f"{path}: image {name!r} is of the {named} split, not of {split}: is it a renamed file?")
    if split == "test":
        if label != TEST_CLASS.index:
            raise LabelError(f"{path}: image {name!r} has the label {label}, but images of the test split have none")
        return label
    if not 0 <= label < len(refs):
        raise LabelError(f"{path}: image {name!r} has the label {label}, which is not a class index")
    for wnid in (appended, train_wnid(name)):
        if wnid is not None and wnid != refs[label].wnid:
            raise LabelError(f"{path}: image {name!r} has the label {label} ({refs[label].wnid}), but is of {wnid}")
    return label


def _require_agreement(path: Path, rows: Sequence[tuple[str, str | None, int]], labels: ValLabels | None) -> None:
    for name, _, label in rows if labels is not None else ():
        assert labels is not None
        if labels.by_name.get(name) not in (None, label):
            raise LabelError(
                f"{path}: image {name!r} has the label {label}, but {labels.source} says {labels.by_name[name]}: leave "
                "out --val-labels, or give the right file"
            )


def _file_identity(path: Path) -> ArchiveId:
    with opened(path) as (stat, read_at):
        length = footer(read_at(max(0, stat.st_size - 8), 8))
        if not length or length > stat.st_size:
            raise ArchiveError(f"{path}: is not a whole parquet file: the download was cut off: continue or repeat it")
        data = read_at(stat.st_size - length, length)
        return identity(path, stat, hashlib.blake2b(data, digest_size=16).hexdigest(), official=False)


def _require_all_pieces(paths: Sequence[Path]) -> None:
    """Refuse a set of files named `train-00003-of-00294.parquet` that lacks some of them."""
    pieces: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        match = _PIECE.fullmatch(path.name)
        if match:
            pieces.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (name, count), numbers in pieces.items():
        missing = sorted(set(range(count)) - numbers)
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise MissingArchiveError(
                f"{paths[0].parent / f'{name}-{missing[0]:05d}-of-{count:05d}.parquet'}{more}: no such file: "
                "download it, or rename the others if they are all that you want"
            )


def _require_distinct(paths: Sequence[Path], hashes: array[int], check: Callable[[], None]) -> None:
    """Refuse an image that appears twice in a class: those with equal hashes are looked at closely."""
    repeated = {one for one, other in itertools.pairwise(sorted(hashes)) if one == other}
    seen: set[tuple[str, int]] = set()
    for path in paths if repeated else ():
        with closing(ParquetFile(str(path))) as file:
            for number in range(file.row_groups):
                check()
                for name, _, label in file.names(number):
                    if hash((name, label)) in repeated:
                        if (name, label) in seen:
                            raise ArchiveError(f"{path}: image {name!r} appears twice")
                        seen.add((name, label))
