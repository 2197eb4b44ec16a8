"""Frozen value types that travel between the modules; no behaviour beyond simple derived values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

SplitName = Literal["train", "val", "test"]
Layout = Literal["index", "padded", "wnid"]
VerifyLevel = Literal["none", "size", "digest"]
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
LAYOUTS: tuple[Layout, ...] = ("index", "padded", "wnid")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassRef:
    """One class: its index, its wnid and the name of its folder in the chosen layout."""

    index: int
    wnid: str
    folder: str


TEST_CLASS = ClassRef(index=-1, wnid="-", folder="")
"""What stands for the class of the test images, which have none: they lie directly in the folder of their split."""


def folder_name(index: int, wnid: str, layout: Layout) -> str:
    """Return the name of a class folder: `0`, `0000` or `n01440764`."""
    return {"index": str(index), "padded": f"{index:04d}", "wnid": wnid}[layout]


def class_refs(wnids: tuple[str, ...], layout: Layout) -> tuple[ClassRef, ...]:
    """Name the class folders of a layout."""
    return tuple(ClassRef(index=i, wnid=wnid, folder=folder_name(i, wnid, layout)) for i, wnid in enumerate(wnids))


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Part `index` (from 0) of `count` of one plan, and where that was read, if not from an option."""

    index: int = 0
    count: int = 1
    source: str = ""

    @property
    def name(self) -> str:
        """Name of the part's journal and lock."""
        return f"{self.index}-of-{self.count}"

    @property
    def whole(self) -> bool:
        """Whether it is all of the plan: then it checks and publishes."""
        return self.count == 1


ANY_TIME = -1
"""`ArchiveId.mtime_ns` of an archive that the run itself changes while it reads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveId:
    """What makes an archive the same archive on the next start; where it lies is not part of it.

    It stands for one file, or for the files that make one split together (a folder of inner tars, several parquet
    files); then its size and time are the sums of theirs.

    Attributes:
        path: where it was found, for messages and for the workers.
        size_bytes: size of the file.
        mtime_ns: its modification time, nanoseconds, or `ANY_TIME`.
        headers: hex digest of the headers that the planner read; "" for a file whose split has one over all files.
        official: whether it has the published size and the published members.
    """

    path: str
    size_bytes: int
    mtime_ns: int
    headers: str
    official: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A contiguous byte range of one file, the unit of work.

    Attributes:
        id: unique in its split and stable from run to run; safe as a file name.
        split: the split it belongs to.
        archive: path, size and modification time of the very file it is read from.
        offset: absolute offset of the first byte that belongs to the shard.
        end: absolute offset behind the last one.
        classes: the classes its files go to.
        format: which reader it needs (`extract.extractor.open_reader`).
        payload: what that reader must know beside this; picklable, of a type that the reader's module defines.
        slot: its number among the shards that this run hands out, by which its worker reports progress.
    """

    id: str
    split: SplitName
    archive: ArchiveId
    offset: int
    end: int
    classes: tuple[ClassRef, ...]
    format: str = "tar"
    payload: object = None
    slot: int = 0

    @property
    def size_bytes(self) -> int:
        """Length of the byte range."""
        return self.end - self.offset


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSource:
    """A tar that is read once, front to back: a compressed file or a pipe; what it holds is not known until then.

    Attributes:
        archive: its identity; the size of a pipe is 0.
        compression: name of the format, or "".
        shape: `nested` (inner tars), `flat` (images), or `kaggle` (images of several splits in folders).
        splits: what it may hold.
        pipe_fd: descriptor of a pipe; None: a file, which is opened when it is read.
        head: bytes that were read from the pipe to recognise it.
        in_zip: it is the tar.gz within Kaggle's older zip.
    """

    archive: ArchiveId
    compression: str
    shape: Literal["nested", "flat", "kaggle"]
    splits: tuple[SplitName, ...]
    pipe_fd: int | None = None
    head: bytes = field(default=b"", repr=False)
    in_zip: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPlan:
    """How a split is read from streams.

    Attributes:
        sources: what it is read from, in this order.
        refs: all classes there are; None: any wnid is one, and class indices are known at the end.
        labels: class indices of validation images by name.
        labels_source: where they come from, for messages.
        labels_given: they are of a file that the user named, so that a stream must not contradict them.
        required: the split was asked for by name: a stream without an image of it is at fault.
    """

    sources: tuple[StreamSource, ...]
    refs: tuple[ClassRef, ...] | None
    labels: Mapping[str, int] = field(default_factory=dict, repr=False)
    labels_source: str = ""
    labels_given: bool = False
    required: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan:
    """The plan of one split.

    Attributes:
        archive: identity of all that the split is read from.
        source: what that was recognised as, for people.
        files: the files that it is read from; empty where `archive` is the only one.
        stream: what it is read from where that cannot be indexed; then its shards come as it is read.
        shards: largest first.
        classes: the classes asked for, in class-index order.
        images: number of images.
        images_exact: False where only extraction can tell (train archives of unknown size): `images` is an estimate.
        content_bytes: bytes to be written: exact for val, an upper bound for train.
        labels_digest: hex digest of the assignment of members to classes.
        notes: what the user should know, a line each.
    """

    split: SplitName
    archive: ArchiveId
    layout: Layout
    classes: tuple[ClassRef, ...]
    shards: tuple[Shard, ...]
    images: int
    images_exact: bool
    content_bytes: int
    labels_digest: str
    source: str = ""
    files: tuple[ArchiveId, ...] = ()
    stream: StreamPlan | None = None
    notes: tuple[str, ...] = ()

    def without_bytes(self, size_bytes: int) -> SplitPlan:
        """Return the plan of a stream of which so many bytes of images are done."""
        left_bytes = max(0, self.content_bytes - size_bytes)
        images = self.images * left_bytes // max(1, self.content_bytes)
        return replace(self, images=images, content_bytes=left_bytes)

    def subset(self, shards: tuple[Shard, ...]) -> SplitPlan:
        """Return the plan of some of its shards; images and bytes are in proportion to theirs."""
        share = sum(shard.size_bytes for shard in shards) / max(1, sum(shard.size_bytes for shard in self.shards))
        return replace(
            self,
            shards=shards,
            stream=None,
            classes=self.classes if shards else (),
            images=round(self.images * share),
            content_bytes=round(self.content_bytes * share),
        )

    @property
    def class_count(self) -> int:
        """Number of classes; test images have none."""
        return sum(ref != TEST_CLASS for ref in self.classes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardDone:
    """A shard whose files and manifest fragment are written (not yet known to be on the disk)."""

    shard: str
    split: SplitName
    images: int
    size_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFailed:
    """A shard that could not be finished; plain strings and numbers, so that it always pickles.

    Attributes:
        kind: `archive`, `source-io`, `target-io`, `host`, `worker-died`, `stopped`, `stalled` or `defect`.
        fatal: no other shard can do better (the target is full, read-only, ...): the run stops.
    """

    shard: str
    split: SplitName
    kind: str
    message: str
    fatal: bool = False
    errno: int | None = None
    traceback: str = ""


Outcome = ShardDone | ShardFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One difference that a check found.

    Attributes:
        class_name: name of the class folder, or "" for the split itself.
        kind: `missing`, `extra`, `count`, `size`, `digest` or `unreadable`.
        expected: what should be there (a count, a size, a digest), or None.
        found: what is there, or None.
        path: path relative to the target with `/`, or None where a whole class is meant.
    """

    class_name: str
    kind: Literal["missing", "extra", "count", "size", "digest", "unreadable"]
    expected: int | str | None = None
    found: int | str | None = None
    path: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitCheck:
    """What a check found in one split.

    Attributes:
        consumed: its archive was consumed and cannot be unpacked again.
        basis: what it was compared with: its manifest, or the published facts where there is none; `unfinished`: an
            unfinished run is there and nothing was compared.
        notes: what the user should know, a line each.
    """

    split: SplitName
    classes: int
    images: int
    problems: tuple[Problem, ...] = field(default=())
    basis: Literal["manifest", "published facts", "unfinished", "image"] = "manifest"
    notes: tuple[str, ...] = ()
    consumed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSummary:
    """What there is of a split after a run; counts as in the JSON object of `unpack`.

    Attributes:
        status: `failed` where shards failed, `incomplete` where it is not published for another reason.
        classes: those published before and those with finished shards.
        images: likewise.
        images_expected: how many there are in the end; None where only the end of a stream will tell.
        size_bytes: of the images that are counted in `images`.
        shards: of the plan, or of this run's part of it.
        shards_skipped: those that an earlier run had done.
        shards_failed: those that could not be extracted.
    """

    status: Literal["published", "incomplete", "failed"]
    classes: int
    images: int
    images_expected: int | None = None
    size_bytes: int
    shards: int
    shards_skipped: int
    shards_failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """The outcome of a run."""

    exit_code: int
    splits: dict[SplitName, SplitSummary]
    failures: tuple[ShardFailed, ...] = ()
    problems: tuple[Problem, ...] = ()
    message: str = ""
