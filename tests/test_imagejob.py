from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest
from factory import WNIDS

from imagenet_unpack.extract.imaging import members_file, packed_file, shard_key
from imagenet_unpack.model import ArchiveId, Shard, SplitPlan, class_refs
from imagenet_unpack.run.imagejob import Job
from imagenet_unpack.run.imageplan import DataArea
from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.targets.imagefile import ImageState
from imagenet_unpack.targets.members import Members

ARCHIVE = ArchiveId(path="/a.zip", size_bytes=600, mtime_ns=0, headers="", official=False)
REFS = class_refs(WNIDS[:1], "index")
BODIES = {100: b"first", 200: b"second member", 300: b"3"}


def shard(offset: int) -> Shard:
    return Shard(
        id=f"train-{offset}",
        split="train",
        archive=ARCHIVE,
        offset=offset,
        end=offset + 100,
        classes=REFS,
        format="zip",
    )


def job_in(folder: Path, done: Iterable[str] = ()) -> Job:
    state = ImageState(folder / "out", Disk())
    state.claim()
    plan = SplitPlan(
        split="train",
        archive=ARCHIVE,
        layout="index",
        classes=REFS,
        shards=tuple(shard(offset) for offset in (300, 100, 200)),
        images=3,
        images_exact=True,
        content_bytes=sum(map(len, BODIES.values())),
        labels_digest="",
    )
    data = DataArea.of([plan], "copy")
    job = Job(state=state, method="copy", plans=(plan,), data=data, identity={}, done=set(done))
    job.continue_packed()
    job.fill()
    return job


def pack(job: Job, offset: int) -> None:
    """What a worker leaves of a shard."""
    body = BODIES[offset]
    packed_file(job.state.folder, shard(offset)).write_bytes(body)
    row = (0, b"n%d.JPEG" % offset, 0, len(body), 1, 2)
    Members.from_rows([row], digests=True).write(members_file(job.state.folder, shard(offset)))
    job.arrived.add(shard_key(shard(offset)))


@pytest.mark.parametrize("order", list(itertools.permutations(BODIES)))
def test_packed_shards_lie_in_one_order_whatever_order_they_arrive_in(tmp_path: Path, order: tuple[int, ...]) -> None:
    job = job_in(tmp_path)
    begin = job.at
    with open(job.state.image, "r+b") as file:
        for offset in order:
            pack(job, offset)
            job.append_packed(file.fileno())
    job.close_data()
    image = job.state.image.read_bytes()
    assert image[begin : job.at] == b"".join(BODIES.values())
    assert [image[job.data.shifts[shard_key(shard(offset))] :][: len(body)] for offset, body in BODIES.items()] == [
        *BODIES.values()
    ]
    assert not list(job.state.folder.glob("*.data"))
    assert not job.todo


@pytest.mark.parametrize("known", [(), (100,), (100, 200), (100, 300), (100, 200, 300)])
def test_what_is_journaled_in_order_is_not_packed_again(tmp_path: Path, known: tuple[int, ...]) -> None:
    job = job_in(tmp_path)
    with open(job.state.image, "r+b") as file:
        for offset in BODIES:
            pack(job, offset)
        job.append_packed(file.fileno())
    first = job.state.image.read_bytes()

    again = job_in(tmp_path, [shard_key(shard(offset)) for offset in known])
    left = [each.offset for each in again.todo]
    assert left == {(100,): [200, 300], (100, 200): [300], (100, 300): [200, 300]}.get(
        known, [] if known else [100, 200, 300]
    )
    with open(again.state.image, "r+b") as file:
        for offset in left:
            pack(again, offset)
        again.append_packed(file.fileno())
    assert again.state.image.read_bytes() == first
    assert again.at == job.at
