"""Plans from Kaggle's zip: members of a split, joined with their labels, cut into runs of about 64 MiB."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from imagenet_unpack.dataset.labels import ValLabels
from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.model import TEST_CLASS, ClassRef, Layout, Shard, SplitName, SplitPlan
from imagenet_unpack.planning.common import (
    RUN_BYTES,
    chosen_classes,
    count_notes,
    identity,
    label_indices,
    label_notes,
    largest_first,
    lines_digest,
)
from imagenet_unpack.planning.zipscan import Columns, read_index
from imagenet_unpack.sources.archive import opened
from imagenet_unpack.sources.zip import ZipRun


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Consecutive members that are wanted: byte range, slices of the directory, and their rows in the columns."""

    offset: int
    end: int
    directory: tuple[tuple[int, int], ...]
    rows: list[int]


class KaggleZip:
    """A zip of Kaggle's shape; its directory is read once, for all splits.

    Attributes:
        splits: which splits it holds.
        holds_targz: it is the older one, which holds no image but a tar.gz of them, and no split.
        solution: content of its `LOC_val_solution.csv`, or None.

    Args:
        path: the zip.
        wnids: the wnids of all classes, in class-index order.
        run_bytes: about how long the run of members of a shard is.
        check: is called now and then while the directory is read, and may raise to end that.

    Raises:
        ArchiveError: it is missing, damaged, hostile, or a zip of something else.
    """

    def __init__(
        self,
        path: Path,
        wnids: tuple[str, ...],
        *,
        run_bytes: int = RUN_BYTES,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = path
        self._run_bytes = run_bytes
        with opened(path) as (stat, read_at):
            self._index = read_index(read_at, stat.st_size, str(path), wnids, check)
            self._archive = identity(path, stat, self._index.headers, official=False)
        self.splits: tuple[SplitName, ...] = tuple(self._index.splits)
        self.holds_targz = self._index.holds_targz
        self.solution = self._index.solution

    def plan(
        self,
        split: SplitName,
        refs: tuple[ClassRef, ...],
        asked: tuple[int, ...] | None,
        layout: Layout,
        labels: ValLabels | None = None,
    ) -> SplitPlan:
        """Plan one split.

        Args:
            split: one of `splits`.
            refs: all classes there are.
            asked: the indices asked for, or None for every class that has an image in the zip.
            layout: names of the class folders.
            labels: image names to class indices; needed for val.

        Raises:
            ArchiveError: it does not hold the split, or a class that was asked for.
            LabelError: a validation image has no label.
        """
        path = str(self._path)
        columns = self._index.splits.get(split)
        if columns is None:
            raise ArchiveError(f"{path}: has no {split} split, only {' and '.join(self.splits)}")
        indices: Sequence[int] = columns.class_index
        classes: tuple[ClassRef, ...] = (TEST_CLASS,)
        labels_digest = lines_digest(f"{ref.index} {ref.wnid}" for ref in refs)
        notes: tuple[str, ...] = ()
        if split == "val":
            assert labels is not None
            indices = label_indices(columns.names, labels, path)
            labels_digest = lines_digest(sorted(map("{} {}".format, columns.names, indices)))
            notes = label_notes(columns.names, labels)
        if split != "test":
            classes = chosen_classes(frozenset(indices), asked, refs, path)
        notes += count_notes(split, Counter(indices), path)
        by_index = {ref.index: ref for ref in classes}
        wanted = array("L", (row for row, index in enumerate(indices) if index in by_index))
        if self._index.leftovers:
            notes += (f"{path}: {self._index.leftovers} files of operating systems are left out (._*, .DS_Store, ...)",)
        runs = enumerate(self._runs(columns, wanted))
        return SplitPlan(
            split=split,
            archive=self._archive,
            layout=layout,
            classes=classes,
            shards=largest_first(self._shard(split, number, run, columns, indices, by_index) for number, run in runs),
            images=len(wanted),
            images_exact=True,
            content_bytes=sum(columns.size_bytes[row] for row in wanted),
            labels_digest=labels_digest,
            notes=notes,
        )

    def _shard(
        self,
        split: SplitName,
        number: int,
        run: _Run,
        columns: Columns,
        indices: Sequence[int],
        by_index: dict[int, ClassRef],
    ) -> Shard:
        present = sorted({indices[row] for row in run.rows})
        position = {index: at for at, index in enumerate(present)}
        classes = tuple(by_index[index] for index in present)
        folder = f"{self._index.prefix}/{split}"
        folders = {f"{folder}/{ref.wnid}": at for at, ref in enumerate(classes)} if split == "train" else {folder: 0}
        labels = {columns.names[row]: position[indices[row]] for row in run.rows} if split == "val" else None
        payload = ZipRun(
            directory=run.directory,
            folders={name.encode(): at for name, at in folders.items()},
            labels=labels,
            members=len(run.rows),
        )
        return Shard(
            id=f"{split}-{number:05d}",
            split=split,
            archive=self._archive,
            offset=run.offset,
            end=run.end,
            classes=classes,
            format="zip",
            payload=payload,
        )

    def _runs(self, columns: Columns, wanted: Sequence[int]) -> Iterator[_Run]:
        """Cut rows of a split, in the order of their offsets."""
        run: list[int] = []
        for row in wanted if self._index.ascending else sorted(wanted, key=columns.header_offset.__getitem__):
            if run and columns.end[row] - columns.header_offset[run[0]] > self._run_bytes:
                yield self._run(columns, run)
                run = []
            run.append(row)
        if run:
            yield self._run(columns, run)

    def _run(self, columns: Columns, rows: list[int]) -> _Run:
        slices: list[tuple[int, int]] = []
        for at, length in sorted((columns.at[row], columns.length[row]) for row in rows):
            if slices and at == sum(slices[-1]):
                slices[-1] = (slices[-1][0], slices[-1][1] + length)
            else:
                slices.append((at, length))
        offsets = self._index.offsets
        return _Run(
            offset=columns.header_offset[rows[0]],
            end=offsets[bisect_right(offsets, columns.header_offset[rows[-1]])],
            directory=tuple(slices),
            rows=rows,
        )
