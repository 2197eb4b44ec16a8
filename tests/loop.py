"""For tests of the loop of a run: an executor that does what it is told, archives of three classes, their plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from factory import images, tar, train_plan, train_tar, val_name, val_plan, write

from imagenet_unpack.model import Outcome, Shard, ShardFailed
from imagenet_unpack.run.executors import Recover, RunShard
from imagenet_unpack.run.runoptions import Replan

WNIDS = ("n01440764", "n01443537", "n01484850")
Behave = Callable[[Shard, RunShard], Outcome | None]


def write_archives(folder: Path) -> Path:
    """Write a train archive of three classes with two images each, and a validation archive with three images."""
    write(folder / "train.tar", train_tar({wnid: tar(images(wnid, [b"a", b"bb"])) for wnid in WNIDS}))
    write(folder / "val.tar", tar((val_name(number), b"v") for number in (1, 2, 3)))
    return folder


class Obedient:
    """An executor in this process that does to each shard what it is told."""

    workers = 1

    def __init__(self, behave: Behave = lambda shard, task: task(shard)) -> None:
        self.behave = behave
        self.taken: list[str] = []
        self.pauses = 0
        self.closed = False

    def run(self, shards: Iterator[Shard | None], run_shard: RunShard, recover: Recover) -> Iterator[Outcome]:
        for shard in shards:
            if shard is None:
                self.pauses += 1
                continue
            self.taken.append(f"{shard.split}/{shard.id}")
            outcome = self.behave(shard, run_shard)
            if outcome is not None:
                yield outcome

    def kill(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def failed(shard: Shard, kind: str, *, fatal: bool = False) -> ShardFailed:
    return ShardFailed(shard=shard.id, split=shard.split, kind=kind, message=f"about {shard.id}", fatal=fatal)


def train(archives: Path) -> Replan:
    return lambda asked: train_plan(archives / "train.tar", asked=asked)


def val(archives: Path) -> Replan:
    return lambda asked: val_plan(archives / "val.tar", asked=asked)


def published(target: Path) -> list[str]:
    return [name for name in ("train", "val") if (target / name).exists()]
