"""Streams into an image: the members of a compressed tar or a pipe are written one after another, as they are read.

Streams are read one at a time, in the order of the splits: where a member lies depends on the archives alone. A run
that continues reads them again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import xxhash

from imagenet_unpack.errors import ArchiveError, LabelError
from imagenet_unpack.extract.imaging import located_time, members_file, shard_key, sorted_members
from imagenet_unpack.extract.worker import Settings, ShardPace, guarded
from imagenet_unpack.model import Outcome, Shard, ShardDone, ShardFailed, SplitName, SplitPlan, StreamSource, class_refs
from imagenet_unpack.planning.common import few
from imagenet_unpack.run.streams import open_cutter, shards_of
from imagenet_unpack.sources.reader import SourceError
from imagenet_unpack.sources.stream import Buffers, Fault, InMemory
from imagenet_unpack.targets.members import Located

_AT_ONCE = 512  # pieces of one write; IOV_MAX of Linux is 1024


@dataclass(slots=True, kw_only=True)
class StreamCopy:
    """Copies the members of one stream into an image.

    Attributes:
        source: the stream.
        number: its number among those of its splits, or None for the only one.
        plans: of the splits that it is read for.
        slot: where its progress is shown.
        at: where in the image the next member goes.
        shards: what was written, as shards without a payload.
        shifts: where in the image each shard begins, by `shard_key`.
        faults: the parts of the archive that are damaged.
        notes: what is unusual about it.
        label_error: what ended it, where that is a matter of labels.
    """

    source: StreamSource
    number: int | None
    plans: dict[SplitName, SplitPlan]
    slot: int
    at: int = 0
    shards: list[Shard] = field(default_factory=list)
    shifts: dict[str, int] = field(default_factory=dict)
    faults: list[ShardFailed] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    label_error: LabelError | None = None

    def run(self, image_fd: int, folder: Path, settings: Settings, advance: Callable[[int, int], None]) -> Outcome:
        """Read the stream to its end; never raises.

        Args:
            image_fd: the image.
            folder: gets a file of members for each shard.
            settings: of the run's shards.
            advance: counts bytes and images.
        """
        split = next(iter(self.plans))
        name = os.path.basename(self.source.archive.path).replace(" ", "-")
        stand_in = Shard(id=name, split=split, archive=self.source.archive, offset=0, end=0, classes=(), slot=self.slot)

        def task(stack: ExitStack) -> ShardDone:
            pace = ShardPace(stand_in, settings, folder, stack)
            buffers = Buffers(2)
            streams = {name: plan.stream for name, plan in self.plans.items() if plan.stream is not None}
            classes = {name: frozenset(ref.index for ref in plan.classes) for name, plan in self.plans.items()}
            opened = open_cutter(self.source, streams, classes, buffers, pace.window, pace.window_bytes, stack)
            try:
                for each in opened.stretches():
                    if isinstance(each, Fault):
                        self.faults.append(
                            ShardFailed(shard=each.id, split=each.split, kind="archive", message=each.message)
                        )
                        continue
                    for shard in shards_of(each, self.source, self.number):
                        advance(0, self._write(shard, image_fd, folder, pace))
                        buffers.release(each.buffer)
            except LabelError as error:
                self.label_error = error
                raise SourceError(str(error)) from None
            opened.verify_unchanged()
            self.notes = (*opened.cutter.notes, *opened.placer.notes())
            return ShardDone(shard=name, split=split, images=0, size_bytes=opened.raw.taken_bytes)

        return guarded(stand_in, settings, folder, task)

    def _write(self, shard: Shard, image_fd: int, folder: Path, pace: ShardPace) -> int:
        """Write the members of one shard; return how many there are."""
        payload = shard.payload
        assert isinstance(payload, InMemory)
        begin = self.at
        rows: list[Located] = []
        pieces: list[memoryview] = []
        for position, name, size_bytes, mtime_s, start in payload.members:
            view = payload.buffer.view[start : start + size_bytes]
            digest = xxhash.xxh3_64_intdigest(view)
            rows.append((position, name.encode(), self.at - begin, size_bytes, located_time(mtime_s), digest))
            pieces.append(view)
            self.at += size_bytes
        at = begin
        for first in range(0, len(pieces), _AT_ONCE):
            at = _write_all(image_fd, pieces[first : first + _AT_ONCE], at, pace.write)
        sorted_members(shard, rows, digests=True).write(members_file(folder, shard))
        self.shards.append(replace(shard, payload=None, offset=begin, end=self.at))
        self.shifts[shard_key(shard)] = begin
        return len(rows)


def stream_copies(plans: Sequence[SplitPlan], slot: int) -> list[StreamCopy]:
    """Return the streams of some splits, each of which may hold several, in the order in which they are read.

    Args:
        plans: of the splits.
        slot: the first one that is free.
    """
    copies: dict[str, StreamCopy] = {}
    for plan in plans:
        sources = plan.stream.sources if plan.stream is not None else ()
        for number, source in enumerate(sources):
            path = source.archive.path
            if path not in copies:
                several = len(sources) > 1
                copies[path] = StreamCopy(
                    source=source, number=number if several else None, plans={}, slot=slot + len(copies)
                )
            copies[path].plans[plan.split] = plan
    return list(copies.values())


def completed(
    plans: Sequence[SplitPlan], shards: Sequence[Shard], *, classes_named: bool, note: Callable[[str], None]
) -> tuple[SplitPlan, ...]:
    """Return the plans with what was found in their streams; those of which nothing was there are left out.

    Args:
        plans: of all splits.
        shards: what the streams held.
        classes_named: the classes were asked for by name.
        note: shows a message to the user.

    Raises:
        ArchiveError: a split, or a class that was asked for, is not there.
    """
    made = []
    for plan in plans:
        own = tuple(shard for shard in shards if shard.split == plan.split)
        if plan.stream is None:
            made.append(plan)
        elif own:
            made.append(_complete(plan, own, classes_named=classes_named))
        elif plan.stream.required or (plan is plans[-1] and not made):
            raise ArchiveError(f"{plan.archive.path}: contains no image of the {plan.split} split that was asked for")
        else:
            note(f"{plan.archive.path}: contains no image of the {plan.split} split")
    return tuple(made)


def _complete(plan: SplitPlan, shards: tuple[Shard, ...], *, classes_named: bool) -> SplitPlan:
    assert plan.stream is not None
    found = {ref.wnid for shard in shards for ref in shard.classes}
    if plan.stream.refs is None:  # class indices are known now that all wnids are
        refs = class_refs(tuple(sorted(found)), plan.layout)
        by_wnid = {ref.wnid: ref for ref in refs}
        shards = tuple(replace(shard, classes=tuple(by_wnid[ref.wnid] for ref in shard.classes)) for shard in shards)
        return replace(plan, classes=refs, shards=shards)
    absent = [ref.wnid for ref in plan.classes if ref.wnid not in found]
    if absent and classes_named:
        raise ArchiveError(f"{plan.archive.path}: has no image of {few(absent)}: choose other --classes")
    classes = tuple(ref for ref in plan.classes if ref.wnid in found)
    return replace(plan, classes=classes, shards=shards)


def _write_all(fd: int, pieces: Sequence[memoryview], at: int, pace: Callable[[int], None]) -> int:
    """Write pieces one after another and return where they end."""
    left = [piece for piece in pieces if len(piece)]
    pace(sum(map(len, left)))
    while left:
        written = os.pwritev(fd, left, at)
        at += written
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]
    return at
