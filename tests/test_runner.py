"""The loop of a run, with executors that do what a test wants; and the ledger by which it ends."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import loop
import pytest
from factory import train_plan, val_plan
from loop import Behave, Obedient, failed, published, train, val

from imagenet_unpack.errors import ArchiveError, ExitCode, StoppedError
from imagenet_unpack.model import Outcome, Part, RunSummary, Shard, ShardDone, SplitName, SplitPlan
from imagenet_unpack.reporter import NullReporter
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.run.executors import RunShard, SerialExecutor
from imagenet_unpack.run.ledger import Ledger
from imagenet_unpack.run.runner import run
from imagenet_unpack.run.runoptions import Options, Replan
from imagenet_unpack.run.splitrun import SplitRun
from imagenet_unpack.targets import journal
from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.targets.paths import STATE_FOLDER, SplitPaths
from imagenet_unpack.targets.split import Split


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loop.write_archives(tmp_path_factory.mktemp("archives"))


def go(
    target: Path,
    planners: dict[SplitName, Replan],
    executor: Obedient | SerialExecutor,
    cancel: Cancel | None = None,
    part: Part = Part(),
    commit_s: float | None = None,
) -> RunSummary:
    options = Options(target=target, layout="index", planners=planners, classes=None, part=part, commit_s=commit_s)
    return run(options, executor, NullReporter(), cancel or Cancel())


def test_a_whole_run(archives: Path, tmp_path: Path) -> None:
    executor = Obedient()
    summary = go(tmp_path, {"train": train(archives), "val": val(archives)}, executor)
    assert summary.exit_code == ExitCode.OK
    assert {name: split.images for name, split in summary.splits.items()} == {"train": 6, "val": 3}
    assert published(tmp_path) == ["train", "val"]
    assert executor.closed
    assert not list((tmp_path / STATE_FOLDER).glob("run-*"))


def test_a_fault_of_one_plan_ends_the_others(archives: Path, tmp_path: Path) -> None:
    """A thread that is left behind in a library would abort the process instead of its exit code."""
    cancel, begun, ended = Cancel(), threading.Event(), threading.Event()

    def slow(_: tuple[int, ...] | None) -> SplitPlan:
        begun.set()
        while not cancel.requested:
            cancel.wait(0.01)
        ended.set()
        raise ArchiveError("nobody asks for this any more")

    def damaged(_: tuple[int, ...] | None) -> SplitPlan:
        begun.wait()
        raise ArchiveError("damaged")

    with pytest.raises(ArchiveError, match=r"^damaged$"):
        go(tmp_path, {"train": damaged, "val": slow}, Obedient(), cancel)
    assert ended.is_set()


def test_what_is_journaled_while_work_goes_on_was_done_before_the_sync_began(archives: Path, tmp_path: Path) -> None:
    known: list[set[str]] = []

    def behave(shard: Shard, task: RunShard) -> Outcome:
        outcome = task(shard)
        while any(thread.name == "sync" for thread in threading.enumerate()):
            time.sleep(0.01)
        known.append(set(journal.read(SplitPaths(tmp_path, "train").home, "train")))
        return outcome

    executor = Obedient(behave)
    summary = go(tmp_path, {"train": train(archives)}, executor, commit_s=0)
    assert summary.exit_code == ExitCode.OK
    first = executor.taken[0].removeprefix("train/")
    assert known == [set(), set(), {first}]


@pytest.mark.parametrize(
    ("behave", "code", "others"),
    [
        (lambda shard, _: failed(shard, "stopped"), ExitCode.STOPPED, 2),
        (lambda _shard, _: None, ExitCode.STOPPED, 2),
        (lambda shard, _: failed(shard, "archive"), ExitCode.SHARDS_FAILED, 2),
        (lambda shard, _: failed(shard, "host", fatal=True), ExitCode.STOPPED, 0),
        (lambda shard, _: failed(shard, "defect"), ExitCode.DEFECT, 2),
    ],
    ids=["stopped by nobody", "no outcome", "failed", "fatal", "defect"],
)
@pytest.mark.parametrize("number", [0, 2])
def test_a_shard_that_is_not_done_is_never_success(
    archives: Path, tmp_path: Path, behave: Behave, code: int, others: int, number: int
) -> None:
    """Whatever becomes of the first shard, or of the last one."""
    executor = Obedient()

    def sometimes(shard: Shard, task: RunShard) -> Outcome | None:
        return behave(shard, task) if len(executor.taken) == number + 1 else task(shard)

    executor.behave = sometimes
    summary = go(tmp_path, {"train": train(archives)}, executor)
    assert summary.exit_code == code
    assert summary.message
    assert published(tmp_path) == []
    assert executor.closed
    again = go(tmp_path, {"train": train(archives)}, Obedient())
    assert again.exit_code == ExitCode.OK
    assert again.splits["train"].shards_skipped == max(others, number)


def test_a_split_that_is_whole_is_published_though_another_is_not(archives: Path, tmp_path: Path) -> None:
    executor = Obedient(lambda shard, task: failed(shard, "archive") if shard.split == "train" else task(shard))
    summary = go(tmp_path, {"train": train(archives), "val": val(archives)}, executor)
    assert summary.exit_code == ExitCode.SHARDS_FAILED
    assert published(tmp_path) == ["val"]


def test_a_fatal_outcome_ends_the_run(archives: Path, tmp_path: Path) -> None:
    executor = Obedient(lambda shard, _: failed(shard, "target-io", fatal=True))
    summary = go(tmp_path, {"train": train(archives), "val": val(archives)}, executor)
    assert summary.exit_code == ExitCode.STOPPED
    assert len(executor.taken) == 1
    assert "about" in summary.message


def test_a_request_ends_the_run_and_what_is_done_is_kept(archives: Path, tmp_path: Path) -> None:
    cancel = Cancel()

    def stop_after(shard: Shard, task: RunShard) -> Outcome:
        outcome = task(shard)
        cancel.request(signal.SIGUSR1)
        return outcome

    summary = go(tmp_path, {"train": train(archives)}, Obedient(stop_after), cancel)
    assert summary.exit_code == ExitCode.SIGUSR1
    assert published(tmp_path) == []
    assert summary.splits["train"].images == 2
    assert go(tmp_path, {"train": train(archives)}, Obedient()).splits["train"].shards_skipped == 1


def test_a_request_ends_the_planning_and_nothing_is_written(archives: Path, tmp_path: Path) -> None:
    """A plan that does not end holds nobody up."""
    cancel, ended = Cancel(), threading.Event()

    def slow(asked: tuple[int, ...] | None) -> SplitPlan:
        cancel.request(signal.SIGTERM)
        ended.wait(30)
        return train_plan(archives / "train.tar", asked=asked)

    executor = Obedient()
    summary = go(tmp_path / "t", {"train": slow}, executor, cancel)
    ended.set()
    assert summary.exit_code == ExitCode.SIGTERM
    assert executor.taken == []
    assert executor.closed
    assert not (tmp_path / "t").exists()


def test_val_joins_in_when_it_is_planned(archives: Path, tmp_path: Path) -> None:
    executor = Obedient()

    def slow(asked: tuple[int, ...] | None) -> SplitPlan:
        while not executor.pauses:  # until train is done and there is nothing else to do
            pass
        return val_plan(archives / "val.tar", asked=asked)

    summary = go(tmp_path, {"train": train(archives), "val": slow}, executor)
    assert summary.exit_code == ExitCode.OK
    assert [name.partition("/")[0] for name in executor.taken] == ["train"] * 3 + ["val"]


def test_a_fault_met_late_in_planning_publishes_nothing(archives: Path, tmp_path: Path) -> None:
    executor = Obedient()

    def damaged(_: tuple[int, ...] | None) -> SplitPlan:
        while not executor.taken:
            pass
        raise ArchiveError("val is damaged")

    summary = go(tmp_path, {"train": train(archives), "val": damaged}, executor)
    assert summary.exit_code == ExitCode.CANNOT_START
    assert "val is damaged" in summary.message
    assert published(tmp_path) == []


def test_a_fault_before_the_start_is_raised(tmp_path: Path) -> None:
    def missing(_: tuple[int, ...] | None) -> SplitPlan:
        raise ArchiveError("no such file")

    executor = Obedient()
    with pytest.raises(ArchiveError):
        go(tmp_path / "t", {"train": missing}, executor)
    assert executor.closed
    assert not (tmp_path / "t").exists()


def test_an_executor_that_gives_up_ends_the_run(archives: Path, tmp_path: Path) -> None:
    executor = Obedient()

    def gone(shard: Shard, task: RunShard) -> Outcome:
        if len(executor.taken) > 1:
            raise StoppedError("the scheduler is gone")
        return task(shard)

    executor.behave = gone
    summary = go(tmp_path, {"train": train(archives)}, executor)
    assert (summary.exit_code, summary.message) == (ExitCode.STOPPED, "the scheduler is gone")
    assert summary.splits["train"].images == 2
    assert go(tmp_path, {"train": train(archives)}, Obedient()).splits["train"].shards_skipped == 1


def test_parts_are_done_without_being_published(archives: Path, tmp_path: Path) -> None:
    for index in range(2):
        summary = go(tmp_path, {"train": train(archives)}, Obedient(), part=Part(index=index, count=2))
        assert summary.exit_code == ExitCode.OK
        assert published(tmp_path) == []
    summary = go(tmp_path, {"train": train(archives)}, Obedient(lambda _shard, _: None))
    assert summary.exit_code == ExitCode.OK
    assert published(tmp_path) == ["train"]


def split_run(folder: Path, plan: SplitPlan, part: Part = Part()) -> SplitRun:
    paths = SplitPaths(folder, plan.split)
    return SplitRun(target=Split(paths, Disk()), plan=plan, part=part, own=list(plan.shards), shards=len(plan.shards))


def done(shard: Shard) -> ShardDone:
    return ShardDone(shard=shard.id, split=shard.split, images=1, size_bytes=1)


class TestLedger:
    def test_shards_of_two_splits_with_one_id_are_told_apart(self, archives: Path, tmp_path: Path) -> None:
        plans = train_plan(archives / "train.tar"), val_plan(archives / "val.tar")
        renamed = [replace(plan, shards=(replace(plan.shards[0], id="same"),)) for plan in plans]
        ledger = Ledger(("train", "val"), Part())
        slots = [shard.slot for plan in renamed for shard in ledger.open(split_run(tmp_path, plan))]
        assert len(set(slots)) == 2
        first = ledger.record(done(renamed[0].shards[0]))
        assert (first.split, first.slot) == ("train", slots[0])
        assert [len(ledger.splits[name].todo) for name in ("train", "val")] == [0, 1]

    def test_done_is_what_is_published_or_journaled(self, archives: Path, tmp_path: Path) -> None:
        plan = train_plan(archives / "train.tar")
        for part, journaled_is_done in ((Part(), False), (Part(index=0, count=2), True)):
            ledger = Ledger(("train",), part)
            split = split_run(tmp_path, plan, part)
            for shard in ledger.open(split):
                assert not ledger.all_done
                ledger.record(done(shard))
            assert not ledger.all_done  # not journaled yet
            split.uncommitted = []
            assert ledger.all_done is journaled_is_done
            split.published = True
            assert ledger.all_done

    def test_a_split_that_was_never_opened_is_not_done(self) -> None:
        ledger = Ledger(("train", "val"), Part())
        summary = ledger.outcome(Cancel())
        assert summary.exit_code == ExitCode.STOPPED
        assert "val: not started" in summary.message

    def test_nothing_asked_for_is_no_success(self) -> None:
        assert Ledger((), Part()).outcome(Cancel()).exit_code == ExitCode.STOPPED
