"""Splits that are read from streams: threads that read them, and the shards that come of it.

    thread: read, decompress ──▶ thread: cut ──▶ shards in memory ──▶ writer threads: `run_shard`
                                      ▲                                    │
                                      └──────────── buffers ◀──────────────┘

One process with threads, as decompressing, writing and hashing all release the interpreter lock: 300 MB of JPEG images
in a tar.gz took 0.90 s this way and 1.09 s with worker processes that share memory with the reader, where decompressing
alone took 0.91 s (2 cores, tmpfs). Several writers hide the latency of network file systems.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.errors import LabelError, TargetError
from imagenet_unpack.extract.extractor import manifest_rows
from imagenet_unpack.extract.worker import Settings, ShardPace, guarded
from imagenet_unpack.host.status import Monitor
from imagenet_unpack.model import (
    ClassRef,
    Outcome,
    Shard,
    ShardDone,
    ShardFailed,
    SplitName,
    StreamPlan,
    StreamSource,
    class_refs,
)
from imagenet_unpack.planning.streams import Placer
from imagenet_unpack.run.ledger import Ledger
from imagenet_unpack.run.splitrun import SplitRun
from imagenet_unpack.sources.compressed import Decompressed, RawStream, ReadAhead
from imagenet_unpack.sources.reader import SourceError
from imagenet_unpack.sources.stream import Buffers, Cutter, Fault, InMemory, Place, Stretch, Window
from imagenet_unpack.sources.zipmember import MemberStream, open_patched

MAX_WRITERS = 8
_IDLE_S = 0.02
_JOIN_S = 2.0
_SHOWN = 5


class _ClosedError(Exception):
    """The run no longer takes shards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """One stream: its number among those of its splits, or None for the only one, and the splits it is read for."""

    source: StreamSource
    number: int | None
    splits: tuple[SplitName, ...]
    slot: int

    @property
    def id(self) -> str:
        """What stands for the stream as a whole where a shard is named."""
        return os.path.basename(self.source.archive.path).replace(" ", "-")

    @property
    def stand_in(self) -> Shard:
        """A shard that stands for the stream as a whole."""
        archive = self.source.archive
        return Shard(id=self.id, split=self.splits[0], archive=archive, offset=0, end=0, classes=(), slot=self.slot)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ended:
    """A stream has been read to its end, or `failure` says why not; it held images of the classes `held`."""

    reading: _Reading
    failure: ShardFailed | None
    taken_bytes: int
    notes: tuple[str, ...]
    held: Mapping[SplitName, set[int]]


class StreamFeed:
    """Reads the streams of a run and gives their shards; a context manager.

    Args:
        splits: the splits that are read from streams.
        settings: of every shard of the run.
        ledger: enters what comes.
        monitor: watches the slots of streams and of the shards that are given.
        advance: counts bytes and images.
        record: enters the outcome of what is not a shard of an executor.
        note: shows a message to the user.
        writers: how many shards are written at once.
    """

    def __init__(
        self,
        splits: Mapping[SplitName, SplitRun],
        settings: Settings,
        ledger: Ledger,
        *,
        monitor: Monitor,
        advance: Callable[[int, int], None],
        record: Callable[[Outcome], None],
        note: Callable[[str], None],
        writers: int,
    ) -> None:
        self._splits = splits
        self._settings = settings
        self._ledger = ledger
        self._monitor = monitor
        self._advance = advance
        self._record = record
        self._note = note
        self._closed = threading.Event()
        self._queue: queue.Queue[Shard | ShardFailed | _Ended] = queue.Queue()
        self._label_error: LabelError | None = None
        self._seen: dict[SplitName, set[str]] = {name: set() for name in splits}
        self._found: dict[SplitName, dict[str, ClassRef]] = {name: {} for name in splits}
        self._held: dict[SplitName, set[int]] = {name: set() for name in splits}
        self._failed: set[SplitName] = set()
        self._finished: set[SplitName] = set()
        readings = self._readings()
        self._left = len(readings)
        self._unread = deque(readings)
        # To read and decompress takes about as long as to write; each reader more takes two buffers.
        readers = min(max(1, writers // 2), len(readings))
        self._buffers = Buffers(writers + readers + 1, self._check)
        self._threads = [
            threading.Thread(target=self._work, name=f"stream-{number}", daemon=True) for number in range(readers)
        ]

    def __enter__(self) -> StreamFeed:
        for reading in self._unread:
            self._monitor.begin(reading.slot)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join(_JOIN_S)
        for name in self._splits.keys() - self._finished:
            self._enter_shards(self._splits[name])

    def shards(self) -> Iterator[Shard | None]:
        """Yield the shards that are not done yet, and None while there is none.

        Raises:
            LabelError: a member has no label.
            TargetError: the stream is not the one that an unfinished run was begun with.
        """
        while self._left:
            try:
                item = self._queue.get(timeout=_IDLE_S)
            except queue.Empty:
                yield None
                continue
            if isinstance(item, Shard):
                shard = self._enter(item)
                if shard is not None:
                    yield shard
            elif isinstance(item, ShardFailed):
                self._fail(item)
            else:
                self._end(item)

    def releasing(self, task: Callable[[Shard], Outcome]) -> Callable[[Shard], Outcome]:
        """Return a task that gives a shard's memory back when it is done."""

        def run(shard: Shard) -> Outcome:
            try:
                return task(shard)
            finally:
                self._release(shard)

        return run

    def finish(self, *, whole_only: bool = False) -> None:
        """Make the plans of the splits that have been read to their ends what was found.

        Args:
            whole_only: leave out those of which shards are still being written or have failed.
        """
        for name, split in self._splits.items():
            if split.unread or name in self._failed or name in self._finished:
                continue
            if not (whole_only and split.todo):
                self._finished.add(name)
                self._enter_shards(split)
                self._finish(name, split)

    @staticmethod
    def _enter_shards(split: SplitRun) -> None:
        split.plan = replace(split.plan, shards=tuple(split.own))

    def _readings(self) -> list[_Reading]:
        splits: dict[str, list[SplitName]] = {}
        sources: dict[str, tuple[StreamSource, int | None]] = {}
        for name, split in self._splits.items():
            assert split.plan.stream is not None
            for number, source in enumerate(split.plan.stream.sources):
                several = len(split.plan.stream.sources) > 1
                sources[source.archive.path] = source, number if several else None
                splits.setdefault(source.archive.path, []).append(name)
        return [
            _Reading(source=source, number=number, splits=tuple(splits[path]), slot=self._ledger.reserve())
            for path, (source, number) in sources.items()
        ]

    # In the reader threads.

    def _check(self) -> None:
        if self._closed.is_set():
            raise _ClosedError

    def _work(self) -> None:
        while True:
            try:
                reading = self._unread.popleft()
            except IndexError:
                return
            shard = reading.stand_in
            paths = self._splits[reading.splits[0]].paths
            ended = _Ended(reading=reading, failure=None, taken_bytes=0, notes=(), held={})

            def task(stack: ExitStack, reading: _Reading = reading) -> ShardDone:
                nonlocal ended
                ended = self._read(reading, stack)
                return ShardDone(shard=reading.id, split=reading.splits[0], images=0, size_bytes=0)

            outcome = guarded(shard, self._settings, paths.tree, task)
            if self._closed.is_set():
                return
            failure = outcome if isinstance(outcome, ShardFailed) else None
            self._queue.put(replace(ended, failure=failure))

    def _read(self, reading: _Reading, stack: ExitStack) -> _Ended:
        """Read one stream to its end."""
        source = reading.source
        first = self._splits[reading.splits[0]]
        pace = ShardPace(reading.stand_in, self._settings, first.paths.root, stack)
        ended = threading.Event()

        def before_read(nbytes: int) -> None:
            self._check()
            if ended.is_set():
                raise _ClosedError
            pace.window(nbytes)

        plans = {each: plan for each in reading.splits if (plan := self._splits[each].plan.stream) is not None}
        classes = {each: frozenset(ref.index for ref in self._splits[each].plan.classes) for each in reading.splits}
        any_wnids = any(plan.refs is None for plan in plans.values())
        opened = open_cutter(source, plans, classes, self._buffers, before_read, pace.window_bytes, stack)
        stack.callback(ended.set)
        cutter, placer = opened.cutter, opened.placer
        try:
            for each in opened.stretches():
                if isinstance(each, Fault):
                    self._queue.put(ShardFailed(shard=each.id, split=each.split, kind="archive", message=each.message))
                else:
                    for shard in shards_of(each, source, reading.number, count_kinds=any_wnids):
                        self._queue.put(shard)
        except LabelError as error:
            self._label_error = error
            raise SourceError(str(error)) from None
        opened.verify_unchanged()
        return _Ended(
            reading=reading,
            failure=None,
            taken_bytes=opened.raw.taken_bytes,
            notes=(*cutter.notes, *placer.notes()),
            held=placer.held,
        )

    # In the run's thread.

    def _enter(self, shard: Shard) -> Shard | None:
        """Enter a shard; return it unless an earlier run has done it."""
        split = self._splits[shard.split]
        self._seen[shard.split].add(shard.id)
        self._found[shard.split].update((ref.wnid, ref) for ref in shard.classes)
        split.own.append(replace(shard, payload=None))
        split.shards += 1
        if shard.id not in split.done:
            entered = self._ledger.add(shard)
            self._monitor.begin(entered.slot)
            return entered
        split.skipped += 1
        same = _is_fragment(split.paths.fragment(shard.id), b"".join(sorted(manifest_rows(shard))))
        self._release(shard)
        if not same:
            raise TargetError(
                f"{shard.archive.path}: differs from what the unfinished run in {split.paths.home} was begun with "
                f"(shard {shard.id}): give the same archive again, or use --restart"
            )
        return None

    def _release(self, shard: Shard) -> None:
        assert isinstance(shard.payload, InMemory)
        self._buffers.release(shard.payload.buffer)

    def _fail(self, failure: ShardFailed) -> None:
        split = self._splits[failure.split]
        self._failed.add(failure.split)
        stand_in = Shard(id=failure.shard, split=failure.split, archive=split.plan.archive, offset=0, end=0, classes=())
        self._ledger.add(stand_in)
        self._record(failure)

    def _end(self, ended: _Ended) -> None:
        self._left -= 1
        shown = self._monitor.end(ended.reading.slot)
        self._advance(ended.taken_bytes - shown.size_bytes if ended.failure is None else 0, 0)
        if self._label_error is not None:
            raise self._label_error
        for note in ended.notes:
            self._note(note)
        for name in ended.reading.splits:
            if ended.failure is None:
                self._splits[name].unread -= 1
                self._held[name] |= ended.held[name]
            else:
                self._fail(replace(ended.failure, split=name))

    def _finish(self, name: SplitName, split: SplitRun) -> None:
        plan = split.plan
        assert plan.stream is not None
        found = self._found[name]
        lost = split.done.keys() - self._seen[name]
        if lost:
            self._fail_split(name, f"{plan.archive.path}: lacks what an earlier run unpacked from it ({_few(lost)})")
        elif not found and split.before is not None and split.damage is None:  # all classes that it holds are published
            split.drop(published=True)
        elif not found and not plan.stream.required and len(self._ledger.splits) > 1:
            split.drop(published=False)
            self._ledger.withdraw(name)
            self._note(f"{plan.archive.path}: contains no image of the {name} split")
        elif not found:
            self._fail_split(name, f"{plan.archive.path}: contains no image of the {name} split that was asked for")
        elif plan.stream.refs is None:
            refs = class_refs(tuple(sorted(found)), plan.layout)
            split.plan = replace(plan, classes=refs)
            split.class_indices = {ref.wnid: ref.index for ref in refs}
        else:
            absent = [ref.wnid for ref in plan.classes if ref.wnid not in found]
            if absent and split.classes_named:
                self._fail_split(name, f"{plan.archive.path}: has no image of {_few(absent)}: choose other --classes")
            split.plan = replace(plan, classes=tuple(ref for ref in plan.classes if ref.wnid in found))
            split.archive_classes = tuple(sorted(self._held[name]))
            self._compare_with_published(name, split)

    def _compare_with_published(self, name: SplitName, split: SplitRun) -> None:
        """Tell where a split with all classes has not the published number of images."""
        published = {"train": ilsvrc2012.TRAIN_IMAGES, "val": ilsvrc2012.VAL_IMAGES}.get(name)
        images = sum(done.images for done in split.done.values())
        if published and len(self._found[name]) == len(ilsvrc2012.WNIDS) and images != published:
            path = split.plan.archive.path
            self._note(f"{path}: holds {images:,} images of {name}; the published data set has {published:,}")

    def _fail_split(self, name: SplitName, message: str) -> None:
        self._fail(ShardFailed(shard=name, split=name, kind="archive", message=message))


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenStream:
    """A stream that is being read."""

    source: StreamSource
    fd: int
    raw: RawStream | MemberStream
    cutter: Cutter
    placer: Placer

    def stretches(self) -> Iterator[Stretch | Fault]:
        """Cut it; errors as those of `Cutter`, and `LabelError`."""
        if self.source.shape == "nested":
            yield from self.cutter.nested(self.placer)
        else:
            yield from self.cutter.flat(self.placer, self.placer.other)
        if self.placer.labels_fault:
            yield Fault(id="val", split="val", message=self.placer.labels_fault)

    def verify_unchanged(self) -> None:
        """Raise `SourceError` if it is a file that is not the one that was planned any more."""
        if self.source.pipe_fd is None:
            _verify_unchanged(self.fd, self.source)


def open_cutter(
    source: StreamSource,
    plans: Mapping[SplitName, StreamPlan],
    classes: Mapping[SplitName, frozenset[int]],
    buffers: Buffers,
    before_read: Callable[[int], None],
    piece_bytes: int,
    stack: ExitStack,
) -> OpenStream:
    """Open a stream to cut it; another thread decompresses ahead.

    Args:
        source: the stream.
        plans: how each split that is asked for is read.
        classes: the class indices that are wanted of each split.
        buffers: memory for stretches.
        before_read: is called before so many bytes are read; may raise to end that.
        piece_bytes: how much to read at once.
        stack: closes everything.

    Raises:
        SourceError: it cannot be opened.
    """
    name = source.archive.path
    fd = os.dup(source.pipe_fd) if source.pipe_fd is not None else _open(source)
    raw: RawStream | MemberStream
    if source.in_zip:
        raw = open_patched(fd, name, before_read=before_read, piece_bytes=piece_bytes)
    else:
        raw = RawStream(fd, name, head=source.head, before_read=before_read, piece_bytes=piece_bytes)
    stack.callback(raw.close)

    def wanted(place: Place) -> bool:
        return place.split in plans and (plans[place.split].refs is None or place.ref.index in classes[place.split])

    ahead = ReadAhead(Decompressed(raw, source.compression, name))
    stack.callback(ahead.close)
    window = Window(ahead, buffers, name)
    stack.callback(window.close)
    return OpenStream(source=source, fd=fd, raw=raw, cutter=Cutter(window, name, wanted), placer=Placer(source, plans))


def _open(source: StreamSource) -> int:
    path = source.archive.path
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SourceError(f"{path}: cannot be opened: {error.strerror}") from error
    try:
        _verify_unchanged(fd, source)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _verify_unchanged(fd: int, source: StreamSource) -> None:
    stat = os.fstat(fd)
    if (stat.st_size, stat.st_mtime_ns) != (source.archive.size_bytes, source.archive.mtime_ns):
        raise SourceError(
            f"{source.archive.path}: it changed during the run: put the planned archive back, or use --restart"
        )


def shards_of(stretch: Stretch, source: StreamSource, number: int | None, *, count_kinds: bool = False) -> list[Shard]:
    """Return a shard for each split that a stretch holds members of; they share its memory.

    Args:
        stretch: what was cut from the stream.
        source: the stream.
        number: its number among those of its splits, or None for the only one.
        count_kinds: say how many members are no images.
    """
    shards = []
    for split in dict.fromkeys(member.place.split for member in stretch.members):
        members = [member for member in stretch.members if member.place.split == split]
        refs = sorted({member.place.ref for member in members}, key=lambda ref: (ref.index, ref.wnid))
        positions = {ref: position for position, ref in enumerate(refs)}
        prefix = "" if source.shape == "nested" else f"{split}-"
        numbered = "" if number is None else f"{number}-"
        shards.append(
            Shard(
                id=f"{prefix}{numbered}{stretch.id}",
                split=split,
                archive=source.archive,
                offset=stretch.offset,
                end=stretch.offset,  # bytes are counted as they are read
                classes=tuple(refs),
                format="memory",
                payload=InMemory(
                    members=tuple(
                        (positions[each.place.ref], each.place.name, each.size_bytes, each.mtime_s, each.start)
                        for each in members
                    ),
                    buffer=stretch.buffer,
                    count_kinds=count_kinds,
                ),
            )
        )
    stretch.buffer.users = len(shards)
    return shards


def _is_fragment(path: Path, rows: bytes) -> bool:
    try:
        return path.read_bytes() == rows
    except FileNotFoundError:
        return False


def _few(names: set[str] | list[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
