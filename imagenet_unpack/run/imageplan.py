"""Where the archives lie in an image, and in which order its classes are described."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import pairwise
from pathlib import Path
from typing import Any

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.extract.imaging import is_packed, members_file, shard_key
from imagenet_unpack.model import ArchiveId, ClassRef, Layout, Shard, SplitPlan
from imagenet_unpack.sources.imagerecord import HeldArchive, Method
from imagenet_unpack.targets.clone import ALIGNMENT_BYTES
from imagenet_unpack.targets.imagetree import DEVICE_BLOCK_BYTES, ImageTree, Placed
from imagenet_unpack.targets.members import Members

_MOSTLY = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A byte range of an archive, and what to add to its offsets to get those in the image."""

    archive: ArchiveId
    offset: int
    end: int
    shift: int

    @property
    def whole(self) -> bool:
        """Whether it is all of the archive."""
        return self.end - self.offset == self.archive.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DataArea:
    """The data of an image.

    Attributes:
        pieces: in the order in which they lie there.
        shifts: for each shard, by `shard_key`, what to add to an offset in its archive.
        end: where manifests and tables begin.
    """

    pieces: tuple[Piece, ...]
    shifts: dict[str, int]
    end: int

    @classmethod
    def of(cls, plans: Sequence[SplitPlan], method: Method, *, everything: bool = True) -> DataArea:
        """Place the archives of some splits.

        Where not everything is wanted, an archive of which little is wanted is copied in pieces, a piece a shard; all
        others lie there as a whole, so that they can still be compared with the published digest.
        """
        if method == "in-place":
            (plan,) = plans
            archive = plan.archive
            piece = Piece(archive=archive, offset=0, end=archive.size_bytes, shift=0)
            shifts = {shard_key(shard): 0 for shard in plan.shards}
            return cls(pieces=(piece,), shifts=shifts, end=_rounded(archive.size_bytes, DEVICE_BLOCK_BYTES))
        pieces: list[Piece] = []
        shifts = {}
        at = ALIGNMENT_BYTES
        for plan in plans:
            by_file: dict[str, list[Shard]] = {}
            plain = [shard for shard in plan.shards if not is_packed(shard)]
            for shard in sorted(plain, key=lambda shard: (shard.archive.path, shard.offset)):
                by_file.setdefault(shard.archive.path, []).append(shard)
            for shards in by_file.values():
                archive = shards[0].archive
                wanted = sum(shard.size_bytes for shard in shards)
                if everything or method == "reflink" or wanted >= _MOSTLY * archive.size_bytes:
                    ranges = [(0, archive.size_bytes, shards)]
                else:
                    ranges = [(shard.offset, shard.end, [shard]) for shard in shards]
                for offset, end, inside in ranges:
                    at = _rounded(at, ALIGNMENT_BYTES if len(inside) > 1 or offset == 0 else DEVICE_BLOCK_BYTES)
                    shift = at + offset % DEVICE_BLOCK_BYTES - offset
                    pieces.append(Piece(archive=archive, offset=offset, end=end, shift=shift))
                    shifts |= {shard_key(shard): shift for shard in inside}
                    at = end + shift
        return cls(pieces=tuple(pieces), shifts=shifts, end=_rounded(at, DEVICE_BLOCK_BYTES))

    def extended(self, shifts: dict[str, int], end: int) -> DataArea:
        """Return the area with more shards behind it, up to `end`."""
        return DataArea(pieces=self.pieces, shifts=self.shifts | shifts, end=_rounded(end, DEVICE_BLOCK_BYTES))

    def gaps(self, plans: Iterable[SplitPlan]) -> Iterator[Piece]:
        """Yield what belongs to no shard: headers of outer tars, ends of archives."""
        spans = sorted(
            (shard.archive.path, shard.offset, shard.end, shard_key(shard)) for plan in plans for shard in plan.shards
        )
        for piece in self.pieces:
            at = piece.offset
            for path, offset, end, _ in spans:
                if path == piece.archive.path and piece.offset <= offset and end <= piece.end:
                    if offset > at:
                        yield Piece(archive=piece.archive, offset=at, end=offset, shift=piece.shift)
                    at = max(at, end)
            if at < piece.end:
                yield Piece(archive=piece.archive, offset=at, end=piece.end, shift=piece.shift)

    def held(self, plans: Iterable[SplitPlan]) -> tuple[HeldArchive, ...]:
        """Return the official archives that lie in the image as a whole."""
        official = {plan.archive.path: plan.split for plan in plans if plan.archive.official and not plan.files}
        return tuple(
            HeldArchive(split=official[piece.archive.path], offset=piece.shift, size_bytes=piece.archive.size_bytes)
            for piece in self.pieces
            if piece.whole and piece.archive.path in official
        )


def identity(plans: Sequence[SplitPlan], method: Method, layouts: Sequence[Layout], data: DataArea) -> dict[str, Any]:
    """Return what must be the same for an unfinished image to be continued; JSON values.

    Times of the archives are no part of it: the same archive gives the same image.
    """
    return {
        "schema": 1,
        "method": method,
        "layouts": list(layouts),
        "data_end": data.end,
        "splits": [
            {
                "split": plan.split,
                "size": plan.archive.size_bytes,
                "headers": plan.archive.headers,
                "labels": plan.labels_digest,
                "classes": [ref.index for ref in plan.classes],
                "shards": _digest([f"{shard.id} {shard.offset} {shard.end}" for shard in plan.shards]),
            }
            for plan in plans
        ],
    }


def identity_digest(value: dict[str, Any]) -> str:
    """Return a digest of an identity, for the record of the image; the method is not part of it."""
    return _digest([json.dumps(value | {"method": ""}, sort_keys=True)])


class Assembler:
    """Describes the classes in a tree as soon as the shards that hold them are done.

    Classes come in the order of their folder names, whatever order shards end in, so the same archives give the same
    tree. A class that is a shard of its own is described when its turn comes; splits whose shards hold several classes
    when all their shards are done.
    """

    def __init__(self, tree: ImageTree, plans: Sequence[SplitPlan], folder: Path, shifts: dict[str, int]) -> None:
        self._tree = tree
        self._folder = folder
        self._shifts = shifts
        self._steps = [step for plan in plans for step in _steps(plan)]
        self._next = 0

    @property
    def order(self) -> list[Shard]:
        """The shards in the order in which they are needed."""
        return [shard for step in self._steps for shard in step.shards]

    @property
    def finished(self) -> bool:
        """Whether everything has been described."""
        return self._next == len(self._steps)

    def advance(self, done: set[str]) -> None:
        """Describe what can be described when the shards with these keys are done.

        Raises:
            ArchiveError: classes do not hold what they should.
        """
        while not self.finished:
            step = self._steps[self._next]
            if any(shard_key(shard) not in done for shard in step.shards):
                return
            self._describe(step)
            self._next += 1

    def _describe(self, step: _Step) -> None:
        if step.begins:
            self._tree.begin_split(step.plan.split)
        streams: dict[ClassRef, list[list[Placed]]] = {ref: [] for ref in step.refs}
        for shard in step.shards:
            shift = self._shifts[shard_key(shard)]
            found: dict[int, list[Placed]] = {}
            for position, name, offset, size, mtime_s, digest in Members.read(members_file(self._folder, shard)).rows():
                found.setdefault(position, []).append((name, offset + shift, size, mtime_s, digest))
            for position, rows in found.items():
                streams[shard.classes[position]].append(rows)
        for ref, lists in streams.items():
            rows = lists[0] if len(lists) == 1 else list(merge(*lists))
            _require_sound(step.plan, ref, rows)
            self._tree.add_class(ref, rows)
        if step.ends:
            self._tree.end_split()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """Classes that are described together, with all shards that hold them."""

    plan: SplitPlan
    refs: tuple[ClassRef, ...]
    shards: tuple[Shard, ...]
    begins: bool
    ends: bool


def _steps(plan: SplitPlan) -> list[_Step]:
    refs = sorted(plan.classes, key=lambda ref: ref.folder.encode() + b"/")
    if any(len(shard.classes) != 1 for shard in plan.shards):
        shards = tuple(sorted(plan.shards, key=lambda shard: (shard.archive.path, shard.offset)))
        return [_Step(plan=plan, refs=tuple(refs), shards=shards, begins=True, ends=True)]
    of_class: dict[int, list[Shard]] = {ref.index: [] for ref in refs}
    for shard in sorted(plan.shards, key=lambda shard: (shard.archive.path, shard.offset)):
        of_class[shard.classes[0].index].append(shard)
    return [
        _Step(
            plan=plan,
            refs=(ref,),
            shards=tuple(of_class[ref.index]),
            begins=number == 0,
            ends=number == len(refs) - 1,
        )
        for number, ref in enumerate(refs)
    ]


def _require_sound(plan: SplitPlan, ref: ClassRef, rows: list[Placed]) -> None:
    """Compare a class with the published facts, and look for names that occur twice in it."""
    for one, other in pairwise(rows):
        if one[0] == other[0]:
            name = one[0].decode("utf-8", "replace")
            raise ArchiveError(f"{plan.archive.path}: member {name!r} appears twice: the archive is damaged")
    if plan.archive.official and plan.split != "test":
        expected = ilsvrc2012.train_images(ref.index) if plan.split == "train" else ilsvrc2012.VAL_IMAGES_PER_CLASS
        if len(rows) != expected:
            raise ArchiveError(
                f"{plan.archive.path}: class {ref.index} ({ref.wnid}) has {len(rows)} images, not the published "
                f"{expected}: download the archive again"
            )


def _rounded(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _digest(lines: list[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
