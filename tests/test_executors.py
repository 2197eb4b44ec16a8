"""One contract that every executor passes."""

from __future__ import annotations

import functools
import os
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagenet_unpack.model import ArchiveId, ClassRef, Outcome, Shard, ShardDone, ShardFailed
from imagenet_unpack.run.executors import Executor, LocalExecutor, SerialExecutor, ThreadExecutor

ARCHIVE = ArchiveId(path="/none.tar", size_bytes=1, mtime_ns=1, headers="", official=False)


def shard(name: str) -> Shard:
    ref = ClassRef(index=0, wnid="n01440764", folder="0")
    return Shard(id=name, split="train", archive=ARCHIVE, offset=0, end=1, classes=(ref,))


SHARDS = [shard(f"s{number}") for number in range(12)]


def done(item: Shard) -> ShardDone:
    return ShardDone(shard=item.id, split=item.split, images=1, size_bytes=2)


def no_recovery(_shard: Shard) -> None:
    return None


def work(item: Shard, folder: str) -> Outcome:
    with open(f"{folder}/{item.id}", "ab") as file:
        file.write(b"x")
    if item.id == "s3":
        return ShardFailed(shard=item.id, split=item.split, kind="archive", message="bad")
    return done(item)


def poison(item: Shard, folder: str) -> Outcome:
    if item.id == "s5":
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    return work(item, folder)


def slow(item: Shard) -> Outcome:
    time.sleep(0.05)
    return done(item)


def die_once(item: Shard, folder: str) -> Outcome:
    mark = Path(folder, "died")
    if item.id == "s5" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return work(item, folder)


@pytest.fixture(params=["serial", "threads", "local"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    made: Executor = SerialExecutor()
    if request.param != "serial":
        made = ThreadExecutor(2) if request.param == "threads" else LocalExecutor(2)
    yield made
    made.close()


@pytest.fixture
def pool() -> Iterator[LocalExecutor]:
    made = LocalExecutor(2)
    yield made
    made.close()


def test_every_shard_has_one_outcome_and_failures_are_values(executor: Executor, tmp_path: Path) -> None:
    outcomes = list(executor.run(iter(SHARDS), functools.partial(work, folder=str(tmp_path)), no_recovery))
    assert sorted(outcome.shard for outcome in outcomes) == sorted(item.id for item in SHARDS)
    assert [outcome.shard for outcome in outcomes if isinstance(outcome, ShardFailed)] == ["s3"]
    assert all(Path(tmp_path, item.id).read_bytes() == b"x" for item in SHARDS)


def test_shards_are_taken_as_workers_come_free(executor: Executor) -> None:
    taken = 0

    def endless() -> Iterator[Shard | None]:
        nonlocal taken
        while not stopped:
            taken += 1
            yield shard(f"e{taken}")
            yield None  # none at the moment

    stopped = False
    count = 0
    for _ in executor.run(endless(), slow, no_recovery):
        count += 1
        stopped = count >= 6
    assert count == taken
    assert taken <= 6 + 8


def at_once(item: Shard, folder: str) -> Outcome:
    with open(f"{folder}/{item.id}", "x"):
        pass
    time.sleep(0.03)
    found = os.listdir(folder)
    os.unlink(f"{folder}/{item.id}")
    return ShardDone(shard=item.id, split=item.split, images=len(found), size_bytes=0)


@pytest.mark.parametrize("workers", [1, 3])
def test_never_more_shards_at_work_than_workers(tmp_path: Path, workers: int) -> None:
    made = LocalExecutor(workers)
    try:
        outcomes = list(made.run(iter(SHARDS), functools.partial(at_once, folder=str(tmp_path)), no_recovery))
    finally:
        made.close()
    seen = [outcome.images for outcome in outcomes if isinstance(outcome, ShardDone)]
    assert max(seen) <= workers


def test_tasks_and_outcomes_survive_pickling() -> None:
    failure = ShardFailed(shard="a", split="val", kind="archive", message="m", errno=5, traceback="t")
    for value in (SHARDS[0], done(SHARDS[0]), failure):
        assert pickle.loads(pickle.dumps(value)) == value


def test_a_killed_worker_costs_its_shards_one_more_try(pool: LocalExecutor, tmp_path: Path) -> None:
    outcomes = list(pool.run(iter(SHARDS), functools.partial(die_once, folder=str(tmp_path)), no_recovery))
    assert sorted(outcome.shard for outcome in outcomes) == sorted(item.id for item in SHARDS)
    assert [outcome.shard for outcome in outcomes if isinstance(outcome, ShardFailed)] == ["s3"]


def test_a_shard_that_kills_its_worker_fails_alone(pool: LocalExecutor, tmp_path: Path) -> None:
    outcomes = list(pool.run(iter(SHARDS), functools.partial(poison, folder=str(tmp_path)), no_recovery))
    assert sorted(outcome.shard for outcome in outcomes) == sorted(item.id for item in SHARDS)
    kinds = {outcome.shard: outcome.kind for outcome in outcomes if isinstance(outcome, ShardFailed)}
    assert kinds == {"s3": "archive", "s5": "worker-died"}


def die_twice(item: Shard, folder: str) -> Outcome:
    """Every third shard kills its worker the first two times."""
    marks = [Path(folder, f"{item.id}-{number}") for number in range(2)]
    for mark in marks if int(item.id[1:]) % 3 == 0 else []:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return done(item)


def test_no_shard_is_lost_when_many_pools_break(tmp_path: Path) -> None:
    made = LocalExecutor(3)
    try:
        outcomes = list(made.run(iter(SHARDS), functools.partial(die_twice, folder=str(tmp_path)), no_recovery))
    finally:
        made.close()
    assert sorted(outcome.shard for outcome in outcomes) == sorted(item.id for item in SHARDS)


def test_what_was_finished_before_a_worker_died_is_not_done_again(pool: LocalExecutor, tmp_path: Path) -> None:
    outcomes = list(pool.run(iter(SHARDS), functools.partial(poison, folder=str(tmp_path)), done))
    assert sorted(outcome.shard for outcome in outcomes) == sorted(item.id for item in SHARDS)
    assert "s5" in {outcome.shard for outcome in outcomes if isinstance(outcome, ShardDone)}
