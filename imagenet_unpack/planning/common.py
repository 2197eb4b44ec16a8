"""What the planners of all kinds of archives share."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.dataset.labels import ValLabels, compare_with_builtin, official_name
from imagenet_unpack.errors import ArchiveError, LabelError
from imagenet_unpack.model import ArchiveId, ClassRef, Shard, SplitName
from imagenet_unpack.sources.archive import ArchiveStat

RUN_BYTES = 64 << 20
"""About how long a run of members is that makes a shard."""

_SHOWN = 5
_VAL_NAME = re.compile(r"ILSVRC2012_val_[0-9]{8}\.JPEG")


def identity(path: Path, stat: ArchiveStat, headers: str, official: bool) -> ArchiveId:
    """Return what identifies an archive, given the digest of its headers."""
    return ArchiveId(
        path=str(path.absolute()),
        size_bytes=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        headers=headers,
        official=official,
    )


def label_indices(names: Sequence[str], labels: ValLabels, archive: str) -> list[int]:
    """Return the class index of each validation image.

    Raises:
        LabelError: an image has no label.
    """
    by_name = labels.by_name
    unlabelled = [name for name in names if name not in by_name]
    if unlabelled:
        hint = _unlabelled_hint(unlabelled[0], by_name)
        raise LabelError(
            f"{labels.source}: has no label for {len(unlabelled)} of {len(names)} members of {archive}, "
            f"such as {unlabelled[0]!r}: {hint}"
        )
    return [by_name[name] for name in names]


def _unlabelled_hint(name: str, by_name: Mapping[str, int]) -> str:
    if re.match(r"n[0-9]{8}[_.]", name):
        return "this looks like a train archive: give it with --train-archive"
    if official_name(name) in by_name:
        return (
            "the names differ in the extension only: rename the members to .JPEG, or give --val-labels a file that has "
            "them as they are"
        )
    return "give the right file with --val-labels"


def label_notes(names: Sequence[str], labels: ValLabels) -> tuple[str, ...]:
    """Warn of labels that differ from the published ones, for members that have the names of the official images."""
    official = {name: labels.by_name[name] for name in names if _VAL_NAME.fullmatch(name)}
    return compare_with_builtin(ValLabels(by_name=official, source=labels.source))


def count_notes(split: SplitName, counts: Mapping[int, int], archive: str) -> tuple[str, ...]:
    """Warn of classes with other numbers of images than published, where an archive has all classes of ImageNet-1K."""
    if split == "test" or counts.keys() != set(range(len(ilsvrc2012.WNIDS))):
        return ()

    def published(index: int) -> int:
        return ilsvrc2012.train_images(index) if split == "train" else ilsvrc2012.VAL_IMAGES_PER_CLASS

    differ = [index for index in sorted(counts) if counts[index] != published(index)]
    if not differ:
        return ()
    first = differ[0]
    note = (
        f"{archive}: {len(differ)} of {len(counts)} classes have other numbers of {split} images than published, "
        f"such as {ilsvrc2012.WNIDS[first]} ({counts[first]} instead of {published(first)})"
    )
    return (note,)


def chosen_classes(
    present: Collection[int], asked: tuple[int, ...] | None, refs: tuple[ClassRef, ...], archive: str
) -> tuple[ClassRef, ...]:
    """Return the classes asked for, or (None) all that have an image in the archive.

    Raises:
        ArchiveError: one that was asked for has none.
    """
    wanted = sorted(present) if asked is None else asked
    absent = [refs[index].wnid for index in wanted if index not in present]
    if absent:
        raise ArchiveError(f"{archive}: has no image of {few(absent)}: choose other --classes or another archive")
    return tuple(refs[index] for index in wanted)


def lines_digest(lines: Iterable[str]) -> str:
    """Return the hex digest of some lines."""
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def largest_first(shards: Iterable[Shard]) -> tuple[Shard, ...]:
    """Order shards by size, so that the last ones to end are short."""
    return tuple(sorted(shards, key=lambda shard: (-shard.size_bytes, shard.id)))


def few(names: list[str]) -> str:
    """Name the first few for a message, and count the others."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
