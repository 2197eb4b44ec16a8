"""Plans of train from inner tars: one inner tar, one shard, whether they are in the outer tar or in a folder."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.dataset.names import is_leftover
from imagenet_unpack.errors import ArchiveError, reason
from imagenet_unpack.model import ArchiveId, ClassRef, Layout, Shard, SplitPlan, VerifyLevel, class_refs
from imagenet_unpack.planning import official
from imagenet_unpack.planning.common import few, identity, largest_first, lines_digest
from imagenet_unpack.sources.archive import opened
from imagenet_unpack.sources.members import Member, Members, iter_members
from imagenet_unpack.sources.tar import WholeTar
from imagenet_unpack.sources.tarindex import BLOCK, CutOffError, EndOfArchive, plain_header

_WNID = re.compile(r"n\d{8}")
_INDICES = {wnid: index for index, wnid in enumerate(ilsvrc2012.WNIDS)}
_COMPRESSED = re.compile(r"n\d{8}\.(tar\.(gz|zst|xz|bz2)|tgz)")
_SAMPLED = 8
_USUAL_MEMBER_BYTES = 115_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inner:
    """Where an inner tar lies, and how many images it should have if it has the published size."""

    archive: ArchiveId
    offset: int
    size_bytes: int
    images: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """What holds the inner tars, by wnid."""

    path: Path
    archive: ArchiveId
    inner: dict[str, _Inner]
    files: tuple[ArchiveId, ...]
    notes: tuple[str, ...]


def plan_train(
    path: Path,
    refs: tuple[ClassRef, ...] | None,
    asked: tuple[int, ...] | None,
    layout: Layout,
    verify: VerifyLevel = "size",
) -> SplitPlan:
    """Plan the train split from the outer tar's headers.

    Args:
        path: the archive, a tar of `<wnid>.tar`.
        refs: all classes there are; None: those of the archive, in the lexical order of their wnids.
        asked: the indices asked for, or None for every class that the archive holds.
        layout: names of the class folders.
        verify: what to demand of an archive of the published size.

    Raises:
        ArchiveError: it is missing, damaged, hostile, not a train archive, or lacks a class that was asked for.
    """
    known = None if refs is None else frozenset(ref.wnid for ref in refs)
    with opened(path) as (stat, read_at):
        headers = hashlib.blake2b(digest_size=16)
        found: dict[str, Member] = {}
        members = Members(str(path))
        notes: list[str] = []
        try:
            for entry in iter_members(read_at, 0, stat.st_size, str(path), members):
                if isinstance(entry, EndOfArchive):
                    notes += [f"{path}: {entry.note}"] if entry.note else []
                    continue
                headers.update(read_at(entry.header_offset, entry.data_offset - entry.header_offset))
                wnid = _wnid_of(entry.name, known)
                if wnid is None:
                    raise ArchiveError(
                        f"{path}: member {entry.name!r} is no <wnid>.tar of a known class: {_hint(entry.name)}"
                    )
                if wnid in found:
                    raise ArchiveError(f"{path}: member {entry.name!r} appears twice: the archive is damaged")
                if entry.size_bytes == 0:
                    raise ArchiveError(f"{path}: member {entry.name!r} is empty: the archive is damaged")
                found[wnid] = entry
        except CutOffError as error:
            seen = [(member.name, member.size_bytes) for member in found.values()]
            first = plain_header(read_at(0, BLOCK)) if not seen and stat.st_size >= BLOCK else None
            lost = official.lost_classes(seen or ([first[:2]] if first else []), stat.st_size)
            raise ArchiveError(f"{error}{lost}") from None
    if not found:
        raise ArchiveError(f"{path}: contains no class: not a train archive")
    is_official, size_notes = official.compare(path, stat.st_size, ilsvrc2012.TRAIN_ARCHIVE, len(found), verify=verify)
    archive = identity(path, stat, headers.hexdigest(), is_official)
    has_published_members = (stat.st_size, len(found)) == (
        ilsvrc2012.TRAIN_ARCHIVE.size_bytes,
        ilsvrc2012.TRAIN_ARCHIVE.members,
    )
    source = _Source(
        path=path,
        archive=archive,
        inner={
            wnid: _Inner(
                archive=archive,
                offset=member.data_offset,
                size_bytes=member.size_bytes,
                images=_published_images(wnid) if has_published_members else None,
            )
            for wnid, member in found.items()
        },
        files=(),
        notes=(*size_notes, *notes, *(f"{path}: {note}" for note in members.notes())),
    )
    return _plan(source, refs, asked, layout, verify)


def plan_tar_folder(
    folder: Path,
    refs: tuple[ClassRef, ...] | None,
    asked: tuple[int, ...] | None,
    layout: Layout,
    verify: VerifyLevel = "size",
) -> SplitPlan:
    """Plan the train split from a folder of `<wnid>.tar`: the outer archive, unpacked; arguments as in `plan_train`.

    Raises:
        ArchiveError: a file cannot be read or is empty, or a class that was asked for is missing.
    """
    known = None if refs is None else frozenset(ref.wnid for ref in refs)
    headers = hashlib.blake2b(digest_size=16)
    inner: dict[str, _Inner] = {}
    others: list[str] = []
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ArchiveError(f"{folder}: cannot be read: {reason(error)}") from error
    for name in names:
        wnid = _wnid_of(name, known)
        if wnid is None:
            whole = f"{name.partition('.')[0]}.tar"
            if _COMPRESSED.fullmatch(name) and whole not in names and _wnid_of(whole, known) is not None:
                raise ArchiveError(
                    f"{folder / name}: inner tars in a folder must not be compressed: decompress it first"
                )
            others += [] if is_leftover(name) else [name]
            continue
        with opened(folder / name) as (stat, read_at):
            headers.update(f"{wnid}\n{stat.st_size}\n".encode() + read_at(0, BLOCK))
            file = identity(folder / name, stat, "", official=False)
        inner[wnid] = _Inner(
            archive=file,
            offset=0,
            size_bytes=file.size_bytes,
            images=_published_images(wnid) if file.size_bytes == _published_bytes(wnid) else None,
        )
    if not inner:
        raise ArchiveError(f"{folder}: contains no <wnid>.tar of a known class")
    notes = []
    if others:
        notes.append(f"{folder}: ignored {len(others):,} other files and folders: {few(others)}")
    missing = [] if refs is None else [ref.wnid for ref in refs if ref.wnid not in inner]
    if missing:
        notes.append(f"{folder}: {len(missing):,} of {len(refs or ()):,} classes are not there: {few(missing)}")
    files = tuple(each.archive for each in inner.values())
    is_official = verify != "none" and all(
        wnid in inner and _published_bytes(wnid) in (None, inner[wnid].size_bytes) for wnid in ilsvrc2012.WNIDS
    )
    archive = ArchiveId(
        path=str(folder.absolute()),
        size_bytes=sum(file.size_bytes for file in files),
        mtime_ns=sum(file.mtime_ns for file in files),
        headers=headers.hexdigest(),
        official=is_official,
    )
    source = _Source(path=folder, archive=archive, inner=inner, files=files, notes=tuple(notes))
    return _plan(source, refs, asked, layout, verify)


def _plan(
    source: _Source,
    refs: tuple[ClassRef, ...] | None,
    asked: tuple[int, ...] | None,
    layout: Layout,
    verify: VerifyLevel,
) -> SplitPlan:
    inner, is_official = source.inner, source.archive.official
    if verify != "none" and official.is_task_3({wnid: each.size_bytes for wnid, each in inner.items()}):
        raise ArchiveError(
            f"{source.path}: this is the train archive of task 3 (dogs) by its classes and its size; expected "
            f"{ilsvrc2012.TRAIN_ARCHIVE_NAME}: use --verify-archives none to take it as it is"
        )
    any_wnids = refs is None
    if refs is None:
        refs = class_refs(tuple(sorted(inner)), layout)
    classes = tuple(refs[i] for i in asked) if asked is not None else tuple(r for r in refs if r.wnid in inner)
    absent = [ref.wnid for ref in classes if ref.wnid not in inner]
    if absent:
        raise ArchiveError(
            f"{source.path}: has no inner tar for {few(absent)}: choose other --classes or another archive"
        )
    content_bytes = sum(inner[ref.wnid].size_bytes for ref in classes)
    images = (
        sum(ilsvrc2012.train_images(ref.index) for ref in classes)
        if is_official
        else round(content_bytes / _mean_member_bytes(list(inner.values())))
    )
    return SplitPlan(
        split="train",
        archive=source.archive,
        files=source.files,
        layout=layout,
        classes=classes,
        shards=largest_first(
            Shard(
                id=ref.wnid,
                split="train",
                archive=inner[ref.wnid].archive,
                offset=inner[ref.wnid].offset,
                end=inner[ref.wnid].offset + inner[ref.wnid].size_bytes,
                classes=(ref,),
                payload=WholeTar(images=inner[ref.wnid].images, demand_images=verify != "none", count_kinds=any_wnids),
            )
            for ref in classes
        ),
        images=images,
        images_exact=is_official,
        content_bytes=content_bytes,
        labels_digest=lines_digest(f"{ref.index} {ref.wnid}" for ref in refs),
        notes=source.notes,
    )


def _wnid_of(name: str, known: frozenset[str] | None) -> str | None:
    wnid = name.removesuffix(".tar")
    is_known = _WNID.fullmatch(wnid) is not None if known is None else wnid in known
    return wnid if wnid != name and is_known else None


def _published_images(wnid: str) -> int | None:
    index = _INDICES.get(wnid)
    return None if index is None else ilsvrc2012.train_images(index)


def _published_bytes(wnid: str) -> int | None:
    """Return the published size of an inner tar; None where it is not known exactly."""
    index = _INDICES.get(wnid)
    if index is None or index in ilsvrc2012.TRAIN_INNER_TAR_INEXACT:
        return None
    return ilsvrc2012.train_inner_tar_bytes()[index]


def _mean_member_bytes(inner: Sequence[_Inner]) -> float:
    """Estimate what an image takes in an inner tar, header included, from the first few of some inner tars.

    Faults are not looked for here: they are reported when the class is extracted.
    """
    spans: list[int] = []
    for tar in inner[:: max(1, len(inner) // _SAMPLED)]:
        with suppress(ArchiveError), opened(Path(tar.archive.path)) as (_, read_at):
            entries = islice(iter_members(read_at, tar.offset, tar.offset + tar.size_bytes, ""), _SAMPLED)
            spans.extend(entry.end - entry.header_offset for entry in entries if isinstance(entry, Member))
    return sum(spans) / len(spans) if spans else _USUAL_MEMBER_BYTES


def _hint(name: str) -> str:
    if name.startswith("ILSVRC2012_val_"):
        return "this is the validation archive: give it with --val-archive"
    if name.startswith("ILSVRC2012_test_"):
        return "this is the test archive"
    if _WNID.match(name) and not name.endswith(".tar"):
        return "this is a single inner tar, or an archive of another shape; expected a tar of <wnid>.tar"
    if _WNID.match(name):
        return "for ImageNet-21K and other wnids use --any-wnids"
    return "not a train archive of this data set"
