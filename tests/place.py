"""A staging tree without a run around it, for tests of readers."""

from __future__ import annotations

from pathlib import Path

from imagenet_unpack.extract.extractor import extract_shard
from imagenet_unpack.extract.folders import FolderSink
from imagenet_unpack.extract.sink import Unpaced
from imagenet_unpack.model import Shard, ShardDone
from imagenet_unpack.sources.reader import WINDOW_BYTES


class CountingPace(Unpaced):
    """Lets everything through and keeps count."""

    def __init__(self) -> None:
        self.window_bytes = WINDOW_BYTES
        self.windows: list[int] = []
        self.created = 0
        self.written = 0

    def window(self, nbytes: int) -> None:
        self.windows.append(nbytes)

    def create(self) -> None:
        self.created += 1

    def write(self, nbytes: int) -> None:
        self.written += nbytes


class Place:
    """A staging tree without a run around it."""

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "tree"
        self.fragment = folder / "fragment.tsv"
        self.tree.mkdir(exist_ok=True)
        self.pace = CountingPace()

    def extract(self, shard: Shard, *, uncached_writes: bool = False) -> ShardDone:
        sink = FolderSink(self.tree, self.pace, uncached_writes=uncached_writes)
        return extract_shard(shard, sink, self.fragment, pace=self.pace)

    def files(self) -> dict[str, bytes]:
        return {path.relative_to(self.tree).as_posix(): path.read_bytes() for path in self.tree.rglob("*.*")}
