"""Plans of splits that are read from streams: what a stream is, and where its members go.

Nothing but its beginning is read: the images are not known until the stream is.
"""

from __future__ import annotations

import hashlib
import os
import re
import select
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from imagenet_unpack.dataset.labels import ValLabels, compare_with_builtin, parse_val_labels
from imagenet_unpack.dataset.names import is_leftover, original_name, split_of_name, train_wnid
from imagenet_unpack.errors import ArchiveError, LabelError, MissingArchiveError, reason
from imagenet_unpack.model import (
    TEST_CLASS,
    ArchiveId,
    ClassRef,
    Layout,
    SplitName,
    SplitPlan,
    StreamPlan,
    StreamSource,
)
from imagenet_unpack.planning.common import lines_digest
from imagenet_unpack.sources import magic
from imagenet_unpack.sources.compressed import peek_head
from imagenet_unpack.sources.members import Member, Members
from imagenet_unpack.sources.recognise import first_paths, something_else
from imagenet_unpack.sources.stream import Place
from imagenet_unpack.sources.tarindex import EndOfArchive, Entry, read_entry
from imagenet_unpack.sources.zipmember import MemberStream, open_patched

Shape = Literal["nested", "flat", "kaggle"]
_STDIN = Path("-")
_HEAD_BYTES = 1 << 20  # a block of bzip2, which is decompressed as a whole, has up to 900 KB
_LOOK_BYTES = 64 << 10
_POLL_S = 0.2
_UNKNOWN_END = 1 << 62
_USUAL_IMAGE_BYTES = 115_000
# Of the images' bytes, for estimates: the sizes of the three official archives, in GB.
_SHARE: dict[SplitName, float] = {"train": 147.9, "val": 6.7, "test": 13.7}
_SOLUTION = "LOC_val_solution.csv"
_MAX_SOLUTION_BYTES = 64 << 20  # the real one has about 2 MB
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d{1,9})")
# Hugging Face's train_images_0.tar.gz to train_images_4.tar.gz.
_PIECE = re.compile(r"(.*/train_images_)(\d{1,3})(\.tar(?:\.[a-z0-9]+)?)")
_PIECES = 5
_SAMPLE_BYTES = 10 << 30  # the real ones have about 29 GB each
_WNID = re.compile(r"n\d{8}")
_VAL = re.compile(r"ILSVRC2012_val_\d{8}\.")
_TEST = re.compile(r"ILSVRC2012_test_\d{8}\.")
# https://www.kaggle.com/c/imagenet-object-localization-challenge/data
_KAGGLE = re.compile(r"(?:[^/]+/)?(?:ILSVRC/)?Data/CLS-LOC/(?:(train)/(n\d{8})|(val)|(test))/[^/]+")
_KAGGLE_OTHER = re.compile(r"(?:[^/]+/)?(?:ILSVRC(?:/.*)?|Data(?:/CLS-LOC(?:/.*)?)?|LOC_[a-z_]+\.(?:csv|txt))")


def is_pipe(path: Path) -> bool:
    """Whether a path is a pipe, or `-`: standard input."""
    try:
        return path == _STDIN or stat.S_ISFIFO(path.stat().st_mode)
    except OSError:
        return False


def open_stream(path: Path, check: Callable[[], None] = lambda: None) -> StreamSource:
    """Recognise a compressed file, or a pipe.

    Args:
        path: the file or pipe, or `-`.
        check: is called while a pipe has nothing to read; may raise to end the waiting.

    Raises:
        ArchiveError: it cannot be read, or is not an archive of ImageNet's images.
    """
    is_stdin = path == _STDIN
    name = "standard input" if is_stdin else str(path)
    try:
        fd = 0 if is_stdin else _open(path)
        status = os.fstat(fd)
        if is_stdin and os.isatty(fd):
            raise ArchiveError("standard input is a terminal: pipe an archive into the command, or name a file")
        head = _read(fd, _HEAD_BYTES, check)
    except OSError as error:
        raise ArchiveError(f"{name}: cannot be read: {reason(error)}") from error
    is_file = not is_stdin and stat.S_ISREG(status.st_mode)
    in_zip = is_file and head.startswith(b"PK")
    if in_zip:
        with open_patched(fd, name) as member:
            head = _member_head(member)
    elif is_file:
        os.close(fd)
    if not head:
        raise ArchiveError(f"{name}: is empty: " + ("download it again" if is_file else "nothing was piped into it"))
    if not is_file and head.startswith((b"PK", b"PAR1")):
        what = "zip" if head.startswith(b"PK") else "parquet file"
        raise ArchiveError(f"{name}: a {what} cannot be read front to back: name the file itself with --source")
    compression, start = peek_head(head, _LOOK_BYTES, name)
    if compression and not start:
        raise ArchiveError(
            f"{name}: the {compression} data holds nothing, or is damaged at its beginning: download it again"
        )
    shape, splits = shape_of(start, f"{name} (decompressed)" if compression else name)
    return StreamSource(
        archive=ArchiveId(
            path=name if is_stdin else str(path.absolute()),
            size_bytes=status.st_size if is_file else 0,
            mtime_ns=status.st_mtime_ns if is_file else 0,
            # A pipe may give the same archive compressed or not.
            headers=hashlib.blake2b(head if is_file else start, digest_size=16).hexdigest(),
            official=False,
        ),
        compression=compression,
        shape=shape,
        splits=splits,
        pipe_fd=None if is_file else fd,
        head=b"" if is_file else head,
        in_zip=in_zip,
    )


def _member_head(member: MemberStream) -> bytes:
    """Return the first bytes of a member; damage in them is for its reader to say."""
    head = b""
    with suppress(ArchiveError):
        while len(head) < _HEAD_BYTES and (piece := member.read(_LOOK_BYTES)):
            head += piece
    return head


def _open(path: Path) -> int:
    """Open a file or a pipe; one that the shell has opened, such as /dev/fd/63, is not opened a second time.

    That would wait for ever where whoever writes into it has already ended.
    """
    match = _DESCRIPTOR.fullmatch(str(path))
    return os.dup(int(match[1])) if match else os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _read(fd: int, size: int, check: Callable[[], None]) -> bytes:
    data = b""
    while len(data) < size:
        while not select.select([fd], [], [], _POLL_S)[0]:  # a regular file is always ready
            check()
        piece = os.read(fd, size - len(data))
        if not piece:
            break
        data += piece
    return data


def shape_of(head: bytes, name: str) -> tuple[Shape, tuple[SplitName, ...]]:
    """Return what a tar holds whose first bytes these are, and of which splits.

    Raises:
        ArchiveError: it is not a tar, or one of something else.
    """

    def read_at(offset: int, size: int) -> bytes:
        return head[offset : offset + size]

    offset = 0
    first = True
    while offset < len(head):
        entry = read_entry(read_at, offset, _UNKNOWN_END, name, first=first)
        if isinstance(entry, EndOfArchive):
            break
        offset, first = entry.end, False
        path = entry.path.removeprefix("./")
        if _KAGGLE_OTHER.fullmatch(path.rstrip("/")):
            return "kaggle", ("train", "val", "test")
        if entry.kind == b"5" or _left_behind(path) or path in ("", "."):
            continue
        own, label = original_name(path.rpartition("/")[2])
        if own.endswith(".tar") and _WNID.fullmatch(own[:-4]):
            return "nested", ("train",)
        if _VAL.match(own):
            return "flat", ("val",)
        if _TEST.match(own):
            return "flat", ("test",)
        if label is not None:
            return "flat", ("train",)
        raise something_else(name, first_paths(read_at, _UNKNOWN_END, name)[0])
    if not offset:
        magic.refuse(head[:512], name)
    raise ArchiveError(f"{name}: no image is near its beginning: this is not an archive of ImageNet images")


def plan_streams(
    split: SplitName,
    sources: Sequence[StreamSource],
    refs: tuple[ClassRef, ...] | None,
    asked: tuple[int, ...] | None,
    layout: Layout,
    labels: ValLabels | None,
    *,
    labels_given: bool = False,
    required: bool = True,
) -> SplitPlan:
    """Plan a split that is read from one stream or several.

    Args:
        split: the split.
        sources: what it is read from, in this order.
        refs: all classes there are; None: those of the archive, in the lexical order of their wnids.
        asked: the class indices asked for, or None for all.
        layout: names of the class folders.
        labels: of validation images, for `val`.
        labels_given: the labels are of a file that the user named.
        required: the split was asked for by name.

    Raises:
        MissingArchiveError: one of several numbered files is missing.
    """
    first = sources[0].archive
    size_bytes = sum(source.archive.size_bytes for source in sources)
    missing, later = _missing_piece(sources)
    if missing and (later or size_bytes > _SAMPLE_BYTES):
        raise MissingArchiveError(
            f"{missing}: no such file, but there are other pieces of the same archive: download it too, or rename the "
            "others if they are all that you want"
        )
    several = len(sources) > 1
    archive = ArchiveId(
        path=first.path,
        size_bytes=size_bytes,
        mtime_ns=sum(source.archive.mtime_ns for source in sources),
        headers=lines_digest(source.archive.headers for source in sources) if several else first.headers,
        official=False,
    )
    if split == "test":
        classes: tuple[ClassRef, ...] = (TEST_CLASS,)
    elif refs is None:
        classes = ()
    else:
        classes = refs if asked is None else tuple(refs[index] for index in asked)
    content_bytes = sum(_estimate(source, split) for source in sources)
    if refs is not None and split != "test":
        content_bytes = content_bytes * len(classes) // len(refs)
    lines = [f"{ref.index} {ref.wnid}" for ref in refs or ()]
    if split == "val" and labels is not None:
        lines += sorted(f"{name} {index}" for name, index in labels.by_name.items())
    return SplitPlan(
        split=split,
        archive=archive,
        layout=layout,
        classes=classes,
        shards=(),
        images=content_bytes // _USUAL_IMAGE_BYTES,
        images_exact=False,
        content_bytes=content_bytes,
        labels_digest=lines_digest(lines),
        files=tuple(source.archive for source in sources) if several else (),
        stream=StreamPlan(
            sources=tuple(sources),
            refs=refs,
            labels={} if labels is None else labels.by_name,
            labels_source="" if labels is None else labels.source,
            labels_given=labels_given,
            required=required or all(len(source.splits) == 1 for source in sources),
        ),
        notes=(_note(split, sources), *((f"{missing}: no such file: is this a sample?",) if missing else ())),
    )


def _missing_piece(sources: Sequence[StreamSource]) -> tuple[str, bool]:
    """Return the first of `train_images_0.tar.gz` to `_4` that is not among them, or "", and whether a later one is.

    Only where all of them have such names.
    """
    matches = [_PIECE.fullmatch(source.archive.path) for source in sources]
    numbers = {int(match[2]) for match in matches if match}
    first = matches[0]
    if first is None or None in matches:
        return "", False
    for number in range(max(_PIECES, *numbers)):
        if number not in numbers:
            return f"{first[1]}{number}{first[3]}", number < max(numbers)
    return "", False


def _estimate(source: StreamSource, split: SplitName) -> int:
    """Estimate how many bytes of a split a stream holds: JPEGs are hardly compressed further."""
    return int(source.archive.size_bytes * _SHARE[split] / sum(_SHARE[each] for each in source.splits))


def _left_behind(path: str) -> bool:
    return any(map(is_leftover, path.split("/")))


def what_it_is(source: StreamSource) -> str:
    """Say what a stream is, for people."""
    shape = {"nested": "tar of inner tars", "flat": "tar of images", "kaggle": "tar of Kaggle's shape"}[source.shape]
    if source.compression:
        shape = f"{shape}, compressed with {source.compression}"
    return f"{shape}, in Kaggle's older zip" if source.in_zip else shape


def _note(split: SplitName, sources: Sequence[StreamSource]) -> str:
    name = sources[0].archive.path + (f" and {len(sources) - 1} more" if len(sources) > 1 else "")
    return f"{name}: read once, front to back: how many images of {split} it holds is not known until then"


class Placer:
    """Says where the members of one stream go.

    Attributes:
        held: the class indices of the images met so far, by split, whether they are wanted or not.
        labels_fault: why the validation images met so far went to wrong classes, or "".

    Args:
        source: the stream.
        plans: how each split that is asked for is read.
    """

    def __init__(self, source: StreamSource, plans: Mapping[SplitName, StreamPlan]) -> None:
        self._source = source
        self._name = source.archive.path
        self._plans = plans
        self._refs = next(iter(plans.values())).refs
        self._by_wnid = None if self._refs is None else {ref.wnid: ref for ref in self._refs}
        self.held: dict[SplitName, set[int]] = {split: set() for split in plans}
        self.labels_fault = ""
        val = plans.get("val")
        self._labels: Mapping[str, int] = val.labels if val is not None else {}
        self._labels_source = val.labels_source if val is not None else ""
        self._labels_notes: tuple[str, ...] = ()
        self._labelled: dict[str, int] = {}  # by a table that a later LOC_val_solution.csv may contradict
        self._contradicting = 0
        self._members = Members(self._name)

    def __call__(self, entry: Entry) -> Place | None:
        """Return where an entry goes, or None.

        Raises:
            ArchiveError: it is refused.
            LabelError: it has no label, or one that contradicts another.
        """
        if self._source.shape == "kaggle":
            return self._kaggle(entry)
        member = self._members.take(entry)
        if member is None:
            return None
        return self._inner_tar(member) if self._source.shape == "nested" else self._image(member)

    def other(self, entry: Entry, read: Callable[[], bytes]) -> None:
        """Take the validation labels of a `LOC_val_solution.csv`, unless the user named others.

        Raises:
            ArchiveError: it is too large.
            LabelError: it is damaged.
        """
        plan = self._plans.get("val")
        if plan is None or plan.labels_given or self._refs is None or self._source.shape != "kaggle":
            return
        if entry.kind == b"5" or entry.path.rpartition("/")[2] != _SOLUTION:
            return
        if entry.size_bytes > _MAX_SOLUTION_BYTES:
            raise ArchiveError(f"{self._name}: member {_SOLUTION} is too large")
        data = read()
        if len(data) < entry.size_bytes:
            return  # cut off, which is found when the next header is read
        source = f"{self._name} ({_SOLUTION})"
        labels = parse_val_labels(data, source, tuple(ref.wnid for ref in self._refs))
        self._labels, self._labels_source = labels.by_name, source
        self._labels_notes = compare_with_builtin(labels)
        wrong = [name for name, index in self._labelled.items() if self._labels.get(name) != index]
        if wrong:
            self.labels_fault = (
                f"{source}: comes after the validation images and has other labels than they were unpacked with "
                f"({len(wrong):,} images, such as {wrong[0]}): take it out of the archive, give it with --val-labels "
                "and use --restart"
            )

    def notes(self) -> tuple[str, ...]:
        """Say what was left out, and what is unusual about the labels."""
        found = list(self._members.notes())
        if self._contradicting:
            found.append(f"{self._contradicting:,} of its labels are not the published ones")
        return (*(f"{self._name}: {note}" for note in found), *self._labels_notes)

    def _inner_tar(self, member: Member) -> Place | None:
        wnid = member.name.removesuffix(".tar")
        ref = self._ref(wnid) if wnid != member.name else None
        if ref is None:
            hint = ": for ImageNet-21K and other wnids use --any-wnids" if _WNID.fullmatch(wnid) else ""
            raise ArchiveError(f"{self._name}: member {member.name!r} is no <wnid>.tar of a known class{hint}")
        return self._place("train", ref, "")

    def _image(self, member: Member) -> Place | None:
        own, label = original_name(member.name)
        split = split_of_name(own)
        if split is not None and split not in self._source.splits:
            raise ArchiveError(
                f"{self._name}: member {member.name!r} is of the {split} split, but those before it are of "
                f"{self._source.splits[0]}"
            )
        if split == "val":
            return self._val(own, label)
        if split == "test":
            return self._place("test", TEST_CLASS, own)
        named = train_wnid(own)
        if label and named and label != named:
            raise LabelError(f"{self._name}: member {member.name!r} is labelled {label}, but is of {named}")
        wnid = label or named
        ref = None if wnid is None else self._ref(wnid)
        if ref is None:
            raise ArchiveError(f"{self._name}: member {member.name!r} is not an image of a known class")
        return self._place("train", ref, own)

    def _kaggle(self, entry: Entry) -> Place | None:
        path = entry.path.removeprefix("./")
        match = _KAGGLE.fullmatch(path) if entry.kind != b"5" else None
        if match is None:
            if path.rstrip("/") in ("", ".") or _left_behind(path) or _KAGGLE_OTHER.fullmatch(path.rstrip("/")):
                return None
            if entry.kind == b"5":
                return None
            raise ArchiveError(f"{self._name}: member {path[:300]!r} does not belong to Kaggle's archive of ImageNet")
        member = self._members.take(replace(entry, path=path.rpartition("/")[2]))
        if member is None:
            return None
        if match[3]:
            return self._val(member.name, None)
        if match[4]:
            return self._place("test", TEST_CLASS, member.name)
        ref = self._ref(match[2])
        if ref is None:
            raise ArchiveError(f"{self._name}: member {path[:300]!r} is of no known class")
        return self._place("train", ref, member.name)

    def _val(self, name: str, label: str | None) -> Place | None:
        plan = self._plans.get("val")
        if plan is None or self._refs is None:
            return None
        index = self._labels.get(name)
        if label is not None:
            ref = self._ref(label)
            if ref is None:
                raise LabelError(f"{self._name}: member {name!r} is labelled {label}, which is not a known class")
            if index not in (None, ref.index):
                if plan.labels_given:
                    raise LabelError(
                        f"{self._name}: member {name!r} is labelled {label}, but {plan.labels_source} says {index}: "
                        "leave out --val-labels, or give the right file"
                    )
                self._contradicting += 1
            return self._place("val", ref, name)
        if index is None:
            raise LabelError(
                f"{self._labels_source}: has no label for member {name!r} of {self._name}: give the right file with "
                "--val-labels"
            )
        if self._source.shape == "kaggle":
            self._labelled[name] = index
        return self._place("val", self._refs[index], name)

    def _place(self, split: SplitName, ref: ClassRef, name: str) -> Place | None:
        if split not in self._plans:
            return None
        self.held[split].add(ref.index)
        return Place(split=split, ref=ref, name=name)

    def _ref(self, wnid: str) -> ClassRef | None:
        if self._by_wnid is not None:
            return self._by_wnid.get(wnid)
        return ClassRef(index=0, wnid=wnid, folder=wnid) if _WNID.fullmatch(wnid) else None
