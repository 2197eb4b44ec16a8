"""Plans of val and test from flat tars: every member is indexed, then runs of about 64 MiB are cut."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.dataset.labels import ValLabels
from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.model import (
    TEST_CLASS,
    ArchiveId,
    ClassRef,
    Layout,
    Shard,
    SplitName,
    SplitPlan,
    VerifyLevel,
)
from imagenet_unpack.planning import official
from imagenet_unpack.planning.common import (
    RUN_BYTES,
    chosen_classes,
    identity,
    label_indices,
    label_notes,
    largest_first,
    lines_digest,
)
from imagenet_unpack.sources.archive import ArchiveStat, opened
from imagenet_unpack.sources.members import Member, Members, iter_members
from imagenet_unpack.sources.tar import TarRun
from imagenet_unpack.sources.tarindex import EndOfArchive


@dataclass(frozen=True, slots=True, kw_only=True)
class _Index:
    """What a flat tar holds."""

    stat: ArchiveStat
    headers: str
    members: list[Member]
    notes: tuple[str, ...]


def plan_val(
    path: Path,
    refs: tuple[ClassRef, ...],
    asked: tuple[int, ...] | None,
    layout: Layout,
    labels: ValLabels,
    verify: VerifyLevel = "size",
    run_bytes: int | None = None,
) -> SplitPlan:
    """Plan the validation split: join every member with its label.

    Args:
        path: the archive.
        refs: all classes there are.
        asked: the indices asked for, or None for every class that has an image in the archive.
        layout: names of the class folders.
        labels: image names to class indices.
        verify: what to demand of an archive of the published size.
        run_bytes: about how long a shard is; None: `RUN_BYTES`.

    Raises:
        ArchiveError: it is missing, damaged, hostile or not a validation archive.
        LabelError: a member has no label.
    """
    index = _read_index(path, "validation")
    names = [member.name for member in index.members]
    class_of = dict(zip(names, label_indices(names, labels, str(path)), strict=True))
    classes = chosen_classes(frozenset(class_of.values()), asked, refs, str(path))
    is_official, notes = official.compare(path, index.stat.st_size, ilsvrc2012.VAL_ARCHIVE, len(names), verify=verify)
    archive = identity(path, index.stat, index.headers, is_official)
    chosen = {ref.index for ref in classes}
    taken = [member for member in index.members if class_of[member.name] in chosen]
    return SplitPlan(
        split="val",
        archive=archive,
        layout=layout,
        classes=classes,
        shards=largest_first(_shards("val", taken, archive, lambda name: refs[class_of[name]], run_bytes or RUN_BYTES)),
        images=len(taken),
        images_exact=True,
        content_bytes=sum(member.size_bytes for member in taken),
        labels_digest=lines_digest(sorted(f"{name} {class_index}" for name, class_index in class_of.items())),
        notes=(*notes, *index.notes, *label_notes(names, labels)),
    )


def plan_test(path: Path, verify: VerifyLevel = "size") -> SplitPlan:
    """Plan the test split, which has no labels: its images lie directly in its folder, whatever the layout.

    Raises:
        ArchiveError: it is missing, damaged, hostile or empty.
    """
    index = _read_index(path, "test")
    is_official, notes = official.compare(
        path, index.stat.st_size, ilsvrc2012.TEST_ARCHIVE, len(index.members), verify=verify
    )
    archive = identity(path, index.stat, index.headers, is_official)
    return SplitPlan(
        split="test",
        archive=archive,
        layout="index",
        classes=(TEST_CLASS,),
        shards=largest_first(_shards("test", index.members, archive, lambda _: TEST_CLASS, RUN_BYTES)),
        images=len(index.members),
        images_exact=True,
        content_bytes=sum(member.size_bytes for member in index.members),
        labels_digest=lines_digest(()),
        notes=(*notes, *index.notes),
    )


def _read_index(path: Path, what: str) -> _Index:
    headers = hashlib.blake2b(digest_size=16)
    found: dict[str, Member] = {}
    members = Members(str(path))
    notes: list[str] = []
    with opened(path) as (stat, read_at):
        for entry in iter_members(read_at, 0, stat.st_size, str(path), members):
            if isinstance(entry, EndOfArchive):
                notes += [f"{path}: {entry.note}"] if entry.note else []
                continue
            headers.update(f"{entry.name}\n{entry.header_offset}\n{entry.size_bytes}\n".encode())
            if entry.name in found:
                raise ArchiveError(f"{path}: member {entry.name!r} appears twice: the archive is damaged")
            found[entry.name] = entry
    if not found:
        raise ArchiveError(f"{path}: contains no images: not a {what} archive")
    return _Index(
        stat=stat,
        headers=headers.hexdigest(),
        members=list(found.values()),
        notes=(*notes, *(f"{path}: {note}" for note in members.notes())),
    )


def _shards(
    split: SplitName, members: list[Member], archive: ArchiveId, class_of: Callable[[str], ClassRef], run_bytes: int
) -> Iterator[Shard]:
    runs: list[list[Member]] = []
    for member in members:
        if not runs or member.end - runs[-1][0].header_offset > run_bytes:
            runs.append([])
        runs[-1].append(member)
    for number, run in enumerate(runs):
        refs = {member.name: class_of(member.name) for member in run}
        classes = tuple(sorted(set(refs.values()), key=lambda ref: ref.index))
        position = {ref.index: at for at, ref in enumerate(classes)}
        yield Shard(
            id=f"{split}-{number:05d}",
            split=split,
            archive=archive,
            offset=run[0].header_offset,
            end=run[-1].end,
            classes=classes,
            payload=TarRun(labels={name: position[ref.index] for name, ref in refs.items()}),
        )
