from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import factory
import pytest

from imagenet_unpack.model import SplitPlan
from imagenet_unpack.run.imageplan import DataArea
from imagenet_unpack.sources.imagerecord import Method
from imagenet_unpack.targets.clone import ALIGNMENT_BYTES


@pytest.fixture
def plans(tmp_path: Path) -> list[SplitPlan]:
    """Plans of a train and a validation archive."""
    inner = {wnid: factory.tar(factory.images(wnid, [b"abc" * 999] * 3)) for wnid in factory.WNIDS[:4]}
    train = factory.write(tmp_path / "train.tar", factory.train_tar(inner))
    val = factory.write(tmp_path / "val.tar", factory.tar((factory.val_name(n), b"x" * n) for n in range(1, 9)))
    return [factory.train_plan(train), factory.val_plan(val)]


@pytest.mark.parametrize("method", ["reflink", "copy"])
def test_every_byte_of_the_archives_has_one_place(plans: list[SplitPlan], method: Method) -> None:
    data = DataArea.of(plans, method)
    spans = sorted((piece.offset + piece.shift, piece.end + piece.shift) for piece in data.pieces)
    assert all(piece.whole and piece.shift % ALIGNMENT_BYTES == 0 for piece in data.pieces)
    assert spans[0][0] >= ALIGNMENT_BYTES
    assert all(one[1] <= other[0] for one, other in pairwise(spans))
    assert spans[-1][1] <= data.end
    assert data.end % 4096 == 0
    # What is copied by the shards and what is copied beside them is everything, once.
    copied = sorted(
        [(shard.archive.path, shard.offset, shard.end) for plan in plans for shard in plan.shards]
        + [(gap.archive.path, gap.offset, gap.end) for gap in data.gaps(plans)]
    )
    for plan in plans:
        at = 0
        for _, offset, end in (each for each in copied if each[0] == plan.archive.path):
            assert offset == at
            at = end
        assert at == plan.archive.size_bytes


def test_of_few_classes_the_shards_alone_are_copied(tmp_path: Path) -> None:
    inner = {wnid: factory.tar(factory.images(wnid, [b"abc" * 9999])) for wnid in factory.WNIDS[:9]}
    path = factory.write(tmp_path / "train.tar", factory.train_tar(inner))
    plan = factory.train_plan(path, asked=(2, 5))
    data = DataArea.of([plan], "copy", everything=False)
    assert {(piece.offset, piece.end) for piece in data.pieces} == {(shard.offset, shard.end) for shard in plan.shards}
    assert not list(data.gaps([plan]))
    assert all(piece.shift % 4096 == 0 for piece in data.pieces)  # pages of both files agree
    assert DataArea.of([plan], "reflink").pieces[0].whole


def test_in_place_nothing_moves(plans: list[SplitPlan]) -> None:
    data = DataArea.of(plans[:1], "in-place")
    assert set(data.shifts.values()) == {0}
    assert 0 <= data.end - plans[0].archive.size_bytes < 4096
