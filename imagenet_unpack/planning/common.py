"""What the planners of all kinds of archives share."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from imagenet_unpack.dataset.labels import ValLabels, official_name
from imagenet_unpack.dataset.names import train_wnid
from imagenet_unpack.errors import ArchiveError, LabelError
from imagenet_unpack.model import ArchiveId, ClassRef, Shard
from imagenet_unpack.sources.archive import ArchiveStat

RUN_BYTES = 64 << 20
"""About how long a run of members is that makes a shard."""

_SHOWN = 5


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
        is_train = train_wnid(unlabelled[0]) is not None
        hint = "is this a train archive?" if is_train else "give the right file with --val-labels"
        if official_name(unlabelled[0]) in by_name:
            hint = (
                "the names differ in their extension alone: rename the members to .JPEG, or give --val-labels a file "
                "that lists them as they are"
            )
        raise LabelError(
            f"{labels.source}: has no label for {len(unlabelled)} of {len(names)} members of {archive}, "
            f"such as {unlabelled[0]!r}: {hint}"
        )
    return [by_name[name] for name in names]


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
