"""Compare archives with the published facts: whether one is official and complete, and what a cut-off one lacks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.errors import ArchiveError, reason
from imagenet_unpack.model import SplitName, SplitPlan, VerifyLevel
from imagenet_unpack.sources.mark import is_marked

_HASH_BYTES = 8 << 20
_ARCHIVES: dict[SplitName, ilsvrc2012.Published] = {
    "train": ilsvrc2012.TRAIN_ARCHIVE,
    "val": ilsvrc2012.VAL_ARCHIVE,
    "test": ilsvrc2012.TEST_ARCHIVE,
}


def compare(
    path: Path, size_bytes: int, published: ilsvrc2012.Published, held: int, *, verify: VerifyLevel
) -> tuple[bool, tuple[str, ...]]:
    """Say whether an archive is the official one by its size and the number of its members, and what to note of it.

    Args:
        path: the archive.
        size_bytes: its size.
        published: what is published of it.
        held: how many members it holds.
        verify: `none`: take what is not official as it is; then nothing is called official.

    Raises:
        ArchiveError: it has exactly the published size, but not the published members.
    """
    if published.size_bytes is None:
        note = f"{path}: holds {held:,} {published.member_kind}, the official archive {published.members:,}"
        return False, (note,) if held != published.members else ()
    if size_bytes != published.size_bytes:
        note = f"{path}: custom archive ({size_bytes:,} bytes, the official one has {published.size_bytes:,})"
        return False, (f"{note}: counts are checked against the archive only",)
    if held == published.members:
        return verify != "none", ()
    what = (
        f"{path}: has exactly the size of the official archive, but {held:,} of its {published.members:,} "
        f"{published.member_kind}: its download is incomplete or damaged"
    )
    if verify == "none":
        return False, (f"{what}: taken as it is because of --verify-archives none",)
    raise ArchiveError(f"{what}: download it again, or use --verify-archives none to take what is there")


def is_task_3(inner_bytes: Mapping[str, int]) -> bool:
    """Say whether inner tars, given their sizes by wnid, are those of `ILSVRC2012_img_train_t3.tar`.

    That are 120 classes of dogs of 728 MB together; in the train archive they take 20 times as much, so that a subset
    of it is not mistaken for them.
    """
    size_bytes = sum(inner_bytes.values())
    size_fits = any(abs(size_bytes / unit - ilsvrc2012.TASK_3_MEGABYTES) < 2 for unit in (10**6, 2**20))
    return size_fits and len(inner_bytes) == ilsvrc2012.TASK_3_CLASSES and inner_bytes.keys() <= ilsvrc2012.DOGS


def lost_classes(members: Sequence[tuple[str, int]], size_bytes: int) -> str:
    """Say which classes of the official train archive lie behind the end of a cut-off one, or "" if it is another one.

    Args:
        members: name and size of each inner tar whose header is there, in order.
        size_bytes: of the archive.
    """
    sizes = ilsvrc2012.train_inner_tar_bytes()
    for index, (name, inner_bytes) in enumerate(members):
        same_size = inner_bytes == sizes[index] or index in ilsvrc2012.TRAIN_INNER_TAR_INEXACT
        if name != f"{ilsvrc2012.WNIDS[index]}.tar" or not same_size:
            return ""
    offset = 0
    for index, inner_bytes in enumerate(sizes if members else ()):
        offset += 512 + inner_bytes
        if offset > size_bytes:
            lost = len(ilsvrc2012.WNIDS) - index
            missing = f"{lost} classes, from {ilsvrc2012.WNIDS[index]} (class {index}) on, are missing"
            if lost == 1:
                missing = f"the last class, {ilsvrc2012.WNIDS[index]}, is missing"
            return f"; this is the beginning of the official archive: {missing}: continue or repeat the download"
    return ""


def verify_digest(plan: SplitPlan, advance: Callable[[int], None] = lambda _: None) -> None:
    """Read a whole archive and compare it with the published SHA-256.

    Args:
        plan: of the archive.
        advance: called with the number of bytes read since the last call; may raise to stop reading.

    Raises:
        ArchiveError: it is not the official archive, byte for byte.
    """
    archive, published = plan.archive, _ARCHIVES[plan.split]
    remedy = "use --verify-archives size for samples, re-packed archives and other copies"
    if plan.files or plan.stream is not None or any(shard.format != "tar" for shard in plan.shards):
        raise ArchiveError(f"{archive.path}: no SHA-256 is published for this form of the data set: {remedy}")
    if is_marked(Path(archive.path)):
        raise ArchiveError(
            f"{archive.path}: --consume has freed bytes of it, so its SHA-256 says nothing any more: leave out "
            "--verify-archives digest"
        )
    digest = hashlib.sha256()
    if published.size_bytes in (None, archive.size_bytes):
        try:
            with open(archive.path, "rb", buffering=0) as file:
                while piece := file.read(_HASH_BYTES):
                    digest.update(piece)
                    advance(len(piece))
        except OSError as error:
            raise ArchiveError(f"{archive.path}: cannot be read: {reason(error)}") from error
    if digest.hexdigest() != published.sha256:
        raise ArchiveError(f"{archive.path}: is not the published {published.name}: download it again, or {remedy}")
