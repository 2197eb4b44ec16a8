from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from factory import WNIDS, images, tar, train_plan, train_tar, write

from imagenet_unpack.extract.imaging import ImageSettings, members_file, shard_key
from imagenet_unpack.extract.locating import Together, locate_shards, recover_located
from imagenet_unpack.extract.worker import Settings
from imagenet_unpack.model import Outcome, Shard, ShardDone, ShardFailed
from imagenet_unpack.targets.members import Members


def settings(folder: Path) -> ImageSettings:
    run = Settings(target=str(folder), part="0-of-1", run_file=str(folder / "run"))
    return ImageSettings(run=run, folder=str(folder), copy_to="", shifts={})


def locate(folder: Path, shards: list[Shard], times: Sequence[float] = ()) -> Outcome:
    together = replace(shards[0], payload=Together(shards=tuple(shards)))
    clock = iter(times).__next__ if times else time.perf_counter
    return locate_shards(together, settings(folder), clock)


def archive(folder: Path, counts: list[int]) -> tuple[Path, list[Shard]]:
    classes = {
        wnid: tar(images(wnid, [bytes([number]) * (number * 300) for number in range(count)]))
        for wnid, count in zip(WNIDS, counts, strict=False)
    }
    path = write(folder / "train.tar", train_tar(classes))
    return path, sorted(train_plan(path).shards, key=lambda shard: shard.id)


@pytest.mark.parametrize("times", [(0, 0, 0, 0), (0, 1, 1, 99)], ids=["quick", "advice ignored"])
@pytest.mark.parametrize("counts", [[1], [40], [1, 2, 3, 30, 12], [9, 9, 9, 9, 9, 9, 9, 9, 9]])
def test_members_are_where_their_bytes_are(tmp_path: Path, counts: list[int], times: Sequence[float]) -> None:
    """Whether a tar ends with the first header, before others or with them."""
    path, shards = archive(tmp_path, counts)
    done = locate(tmp_path, shards, times)
    assert isinstance(done, ShardDone)
    assert done.images == sum(counts)
    whole = path.read_bytes()
    for shard, count in zip(shards, counts, strict=True):
        members = Members.read(members_file(tmp_path, shard))
        assert len(members) == count
        for _, name, offset, size, _, digest in members.rows():
            number = int(name.partition(b"_")[2].partition(b".")[0])
            assert whole[offset : offset + size] == bytes([number]) * (number * 300)
            assert digest is None
    assert recover_located(replace(shards[0], payload=Together(shards=tuple(shards))), tmp_path) == done
    members_file(tmp_path, shards[-1]).unlink()
    assert recover_located(replace(shards[0], payload=Together(shards=tuple(shards))), tmp_path) is None


@pytest.mark.parametrize("at", [0, 1, 15])
def test_a_damaged_tar_is_named_and_the_others_are_read(tmp_path: Path, at: int) -> None:
    path, shards = archive(tmp_path, [20, 20, 20])
    data = bytearray(path.read_bytes())
    damaged = data.index(b"%s_%d.JPEG" % (WNIDS[1].encode(), at))
    data[damaged] ^= 1
    path.write_bytes(data)
    shards = [replace(shard, archive=replace(shard.archive, mtime_ns=path.stat().st_mtime_ns)) for shard in shards]
    failed = locate(tmp_path, shards)
    assert isinstance(failed, ShardFailed)
    assert (failed.shard, failed.kind) == (WNIDS[1], "archive")
    left = {file.name for file in tmp_path.glob("*.members")}
    assert left == {f"{shard_key(shard)}.members" for shard in (shards[0], shards[2])}


def test_an_archive_that_changed_is_not_read(tmp_path: Path) -> None:
    path, shards = archive(tmp_path, [3, 3])
    path.write_bytes(path.read_bytes() + bytes(512))
    failed = locate(tmp_path, shards)
    assert isinstance(failed, ShardFailed)
    assert failed.kind == "source-io"
