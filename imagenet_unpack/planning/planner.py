"""Archives, labels and options to a plan: which byte range goes to which class folders. Writes nothing."""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.dataset.labels import ValLabels, compare_with_builtin
from imagenet_unpack.errors import ArchiveError, UsageError
from imagenet_unpack.model import ArchiveId, ClassRef, Layout, Shard, SplitName, SplitPlan, class_refs
from imagenet_unpack.planning.common import (
    RUN_BYTES,
    chosen_classes,
    few,
    identity,
    label_indices,
    largest_first,
    lines_digest,
)
from imagenet_unpack.sources.archive import ArchiveStat, opened
from imagenet_unpack.sources.members import Member, iter_members
from imagenet_unpack.sources.tar import TarRun
from imagenet_unpack.sources.tarindex import EndOfArchive, ReadAt

_WNID = re.compile(r"n\d{8}")
_HASH_BYTES = 8 << 20
_SAMPLED = 8
_USUAL_MEMBER_BYTES = 115_000.0
_MANIFEST_BYTES = 200  # an image's row in its manifest fragment and in the manifest
_OWN_FILES = 16


def parse_classes(spec: str, wnids: tuple[str, ...]) -> tuple[int, ...]:
    """Parse `0-99,n01440764,517`, or `@file` with one such item a line, to sorted class indices.

    Raises:
        UsageError: an item is no class of these, or none is named.
    """
    if spec.startswith("@"):
        try:
            items = Path(spec[1:]).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--classes {spec}: cannot be read: {error}") from error
    else:
        items = spec.split(",")
    by_wnid = {wnid: index for index, wnid in enumerate(wnids)}
    chosen: set[int] = set()
    for item in filter(None, (item.strip() for item in items)):
        span = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", item, re.ASCII)
        if item in by_wnid:
            chosen.add(by_wnid[item])
        elif span and int(span[1]) <= int(span[2] or span[1]) < len(wnids):
            chosen.update(range(int(span[1]), int(span[2] or span[1]) + 1))
        else:
            raise UsageError(f"--classes: {item!r} is no class: give indices 0-{len(wnids) - 1}, ranges or wnids")
    if not chosen:
        raise UsageError(f"--classes {spec}: names no class")
    return tuple(sorted(chosen))


def plan_train(
    path: Path, refs: tuple[ClassRef, ...] | None, asked: tuple[int, ...] | None, layout: Layout
) -> SplitPlan:
    """Plan the train split from the outer tar's headers: one inner tar, one shard.

    Args:
        path: the archive, a tar of `<wnid>.tar`.
        refs: all classes there are; None: those of the archive, in the lexical order of their wnids.
        asked: the indices asked for, or None for every class that the archive holds.

    Raises:
        ArchiveError: it is missing, damaged, hostile, not a train archive, or lacks a class that was asked for.
    """
    known = None if refs is None else {ref.wnid for ref in refs}
    with opened(path) as (stat, read_at):
        headers = hashlib.blake2b(digest_size=16)
        inner: dict[str, Member] = {}
        notes: list[str] = []
        try:
            for entry in iter_members(read_at, 0, stat.st_size, str(path)):
                if isinstance(entry, EndOfArchive):
                    notes += [f"{path}: {entry.note}"] if entry.note else []
                    continue
                headers.update(read_at(entry.header_offset, entry.data_offset - entry.header_offset))
                wnid = entry.name.removesuffix(".tar")
                if wnid == entry.name or not (_WNID.fullmatch(wnid) if known is None else wnid in known):
                    raise ArchiveError(
                        f"{path}: member {entry.name!r} is no <wnid>.tar of a known class: {_hint(entry)}"
                    )
                if wnid in inner:
                    raise ArchiveError(f"{path}: member {entry.name!r} stands there twice: the archive is damaged")
                if entry.size_bytes == 0:
                    raise ArchiveError(f"{path}: member {entry.name!r} is empty: the archive is damaged")
                inner[wnid] = entry
        except ArchiveError as error:
            raise ArchiveError(f"{error}{_lost_classes(stat.st_size)}") from None
        official = stat.st_size == ilsvrc2012.TRAIN_ARCHIVE.size_bytes and len(inner) == len(ilsvrc2012.WNIDS)
        mean = _USUAL_MEMBER_BYTES if official else _mean_member_bytes(read_at, list(inner.values()))
    if refs is None:
        refs = class_refs(tuple(sorted(inner)), layout)
    if not inner:
        raise ArchiveError(f"{path}: holds no class at all: not a train archive")
    classes = tuple(refs[i] for i in asked) if asked is not None else tuple(r for r in refs if r.wnid in inner)
    absent = [ref.wnid for ref in classes if ref.wnid not in inner]
    if absent:
        raise ArchiveError(f"{path}: has no inner tar for {few(absent)}: choose other --classes or another archive")
    archive = identity(path, stat, headers.hexdigest(), official)
    estimate = round(sum(inner[ref.wnid].size_bytes for ref in classes) / mean)
    shards = [
        Shard(
            id=ref.wnid,
            split="train",
            archive=archive,
            offset=inner[ref.wnid].data_offset,
            end=inner[ref.wnid].data_offset + inner[ref.wnid].size_bytes,
            classes=(ref,),
        )
        for ref in classes
    ]
    return SplitPlan(
        split="train",
        archive=archive,
        layout=layout,
        classes=classes,
        shards=largest_first(shards),
        images=sum(ilsvrc2012.train_images(ref.index) for ref in classes) if official else estimate,
        images_exact=official,
        content_bytes=sum(shard.size_bytes for shard in shards),
        labels_digest=lines_digest(f"{ref.index} {ref.wnid}" for ref in refs),
        notes=(*_size_note(path, stat, "train"), *notes),
    )


def plan_val(
    path: Path, refs: tuple[ClassRef, ...], asked: tuple[int, ...] | None, layout: Layout, labels: ValLabels
) -> SplitPlan:
    """Plan the validation split: index every member and join it with its label, then cut runs of about 64 MiB.

    Args:
        path: the archive, flat.
        refs: all classes there are.
        asked: the indices asked for, or None for every class that has an image in the archive.
        labels: image names to class indices.

    Raises:
        ArchiveError: it is missing, damaged, hostile or not a validation archive.
        LabelError: a member has no label.
    """
    with opened(path) as (stat, read_at):
        headers = hashlib.blake2b(digest_size=16)
        members: list[Member] = []
        notes: list[str] = []
        for entry in iter_members(read_at, 0, stat.st_size, str(path)):
            if isinstance(entry, EndOfArchive):
                notes += [f"{path}: {entry.note}"] if entry.note else []
                continue
            headers.update(f"{entry.name}\n{entry.header_offset}\n{entry.size_bytes}\n".encode())
            members.append(entry)
    if not members:
        raise ArchiveError(f"{path}: holds no image at all: not a validation archive")
    seen: dict[str, str] = {}
    for member in members:
        if member.name in seen:
            raise ArchiveError(f"{path}: member {member.name!r} stands there twice: the archive is damaged")
        seen[member.name] = member.name
    present = set(label_indices([member.name for member in members], labels, str(path)))
    classes = chosen_classes(present, asked, refs, str(path))
    official = stat.st_size == ilsvrc2012.VAL_ARCHIVE.size_bytes and len(members) == ilsvrc2012.VAL_IMAGES
    archive = identity(path, stat, headers.hexdigest(), official)
    chosen = {ref.index for ref in classes}
    taken = [member for member in members if labels.by_name[member.name] in chosen]
    return SplitPlan(
        split="val",
        archive=archive,
        layout=layout,
        classes=classes,
        shards=largest_first(list(_val_shards(taken, archive, refs, labels))),
        images=len(taken),
        images_exact=True,
        content_bytes=sum(member.size_bytes for member in taken),
        labels_digest=lines_digest(sorted(f"{member.name} {labels.by_name[member.name]}" for member in members)),
        notes=(*_size_note(path, stat, "val"), *notes, *compare_with_builtin(labels)),
    )


def _val_shards(
    members: list[Member], archive: ArchiveId, refs: tuple[ClassRef, ...], labels: ValLabels
) -> Iterator[Shard]:
    runs: list[list[Member]] = []
    for member in members:
        if not runs or member.end - runs[-1][0].header_offset > RUN_BYTES:
            runs.append([])
        runs[-1].append(member)
    for number, run in enumerate(runs):
        indices = sorted({labels.by_name[member.name] for member in run})
        position = {index: at for at, index in enumerate(indices)}
        yield Shard(
            id=f"val-{number:05d}",
            split="val",
            archive=archive,
            offset=run[0].header_offset,
            end=run[-1].end,
            classes=tuple(refs[index] for index in indices),
            payload=TarRun(labels={member.name: position[labels.by_name[member.name]] for member in run}),
        )


def _mean_member_bytes(read_at: ReadAt, inner: list[Member]) -> float:
    """Estimate what an image takes in an inner tar, header included, from the first few of some inner tars.

    Faults are not for the plan to find: they are met, and told, when the class is extracted.
    """
    spans: list[int] = []
    for tar in inner[:: max(1, len(inner) // _SAMPLED)]:
        with suppress(ArchiveError):
            end = tar.data_offset + tar.size_bytes
            entries = islice(iter_members(read_at, tar.data_offset, end, ""), _SAMPLED)
            spans.extend(entry.end - entry.header_offset for entry in entries if isinstance(entry, Member))
    return sum(spans) / len(spans) if spans else _USUAL_MEMBER_BYTES


def cut(shards: Iterable[Shard], count: int) -> list[list[Shard]]:
    """Deal shards, largest first, to `count` parts: each to the one that has the fewest bytes so far."""
    parts: list[list[Shard]] = [[] for _ in range(count)]
    loads = [(0, index) for index in range(count)]
    for shard in largest_first(list(shards)):
        load, index = heapq.heappop(loads)
        parts[index].append(shard)
        heapq.heappush(loads, (load + shard.size_bytes, index))
    return parts


def needs(plans: Iterable[SplitPlan]) -> dict[str, int]:
    """Return `content_bytes` and `files` (images, class folders, manifests and fragments) that plans will write."""
    plans = list(plans)
    return {
        "content_bytes": sum(plan.content_bytes + plan.images * _MANIFEST_BYTES for plan in plans),
        "files": sum(plan.images + len(plan.classes) + len(plan.shards) + _OWN_FILES for plan in plans),
    }


def _size_note(path: Path, stat: ArchiveStat, split: SplitName) -> tuple[str, ...]:
    published = ilsvrc2012.TRAIN_ARCHIVE if split == "train" else ilsvrc2012.VAL_ARCHIVE
    if stat.st_size == published.size_bytes:
        return ()
    note = (
        f"{path}: not the official archive ({stat.st_size:,} bytes, published {published.size_bytes:,}): "
        "it is checked against itself"
    )
    return (note,)


def _lost_classes(size: int) -> str:
    """Say which classes of the official archive lie behind the end of a cut-off one, by their published sizes."""
    offset = 0
    for index, inner in enumerate(ilsvrc2012.train_inner_tar_bytes()):
        offset += 512 + inner
        if offset > size:
            lost = len(ilsvrc2012.WNIDS) - index
            return (
                f"; if this is a download of the official archive that was cut off, {lost} classes from "
                f"{ilsvrc2012.WNIDS[index]} (class {index}) on are lost: continue or repeat the download"
            )
    return ""


def _hint(member: Member) -> str:
    if member.name.startswith("ILSVRC2012_val_"):
        return "this is the validation archive"
    if _WNID.match(member.name) and not member.name.endswith(".tar"):
        return "this is an inner tar, or a re-packed archive of another shape"
    return "not a train archive of this data set"


def verify_digest(archive: ArchiveId, split: SplitName) -> None:
    """Read a whole archive and hold it against the published SHA-256 (or, without one, MD5).

    Raises:
        ArchiveError: it is not the official archive, byte for byte.
    """
    published = ilsvrc2012.TRAIN_ARCHIVE if split == "train" else ilsvrc2012.VAL_ARCHIVE
    digest = hashlib.sha256()
    if archive.size_bytes == published.size_bytes:
        with open(archive.path, "rb", buffering=0) as file:
            while piece := file.read(_HASH_BYTES):
                digest.update(piece)
    if digest.hexdigest() != published.sha256:
        raise ArchiveError(
            f"{archive.path}: is not the published {published.name}: download it again, "
            "or use --verify-archives size for samples and re-packed archives"
        )
