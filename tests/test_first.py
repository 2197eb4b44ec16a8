"""A split that is published while the others are still extracted."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import loop
import pytest
from factory import val_plan
from loop import Obedient, failed, published, train, val
from program import SLOW, Run, Tree, tree

from imagenet_unpack.cli import main as cli
from imagenet_unpack.dataset.kinds import files_of
from imagenet_unpack.dataset.synth import SynthSpec, write_files
from imagenet_unpack.errors import ArchiveError, ExitCode
from imagenet_unpack.model import Outcome, Part, RunSummary, Shard, SplitName, SplitPlan
from imagenet_unpack.reporter import NullReporter
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.run.executors import RunShard
from imagenet_unpack.run.runner import run
from imagenet_unpack.run.runoptions import Options, Replan
from imagenet_unpack.targets.paths import STATE_FOLDER


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loop.write_archives(tmp_path_factory.mktemp("archives"))


def go(
    target: Path,
    planners: dict[SplitName, Replan],
    executor: Obedient,
    *,
    first: SplitName | None = "val",
    part: Part = Part(),
    cancel: Cancel | None = None,
    notes: list[str] | None = None,
) -> RunSummary:
    class Notes(NullReporter):
        def note(self, message: str) -> None:
            if notes is not None:
                notes.append(message)

    options = Options(
        target=target, layout="index", planners=planners, classes=None, first=first, part=part, durable=False
    )
    return run(options, executor, Notes(), cancel or Cancel())


def wait_for(path: Path, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def both(archives: Path) -> dict[SplitName, Replan]:
    return {"train": train(archives), "val": val(archives)}


def after(target: Path, name: str, then: Callable[[], None] = lambda: None) -> Obedient:
    """An executor that does the last shard of train when `name` is published."""
    executor = Obedient()

    def behave(shard: Shard, task: RunShard) -> Outcome:
        if sum(taken.startswith("train/") for taken in executor.taken) == 3:
            wait_for(target / name)
            then()
        return task(shard)

    executor.behave = behave
    return executor


def test_val_is_published_while_train_goes_on(archives: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    executor = after(tmp_path, "val.manifest.tsv")
    assert go(tmp_path, both(archives), executor, notes=notes).exit_code == ExitCode.OK
    assert [name.partition("/")[0] for name in executor.taken] == ["val"] + ["train"] * 3
    assert published(tmp_path) == ["train", "val"]
    assert [note.partition(" ")[0] for note in notes if " is published after " in note] == ["val", "train"]
    assert not [path for path in (tmp_path / STATE_FOLDER).iterdir() if path.is_dir()]


def test_otherwise_all_is_published_at_the_end(archives: Path, tmp_path: Path) -> None:
    def behave(shard: Shard, task: RunShard) -> Outcome:
        assert published(tmp_path) == []
        return task(shard)

    executor = Obedient(behave)
    assert go(tmp_path, both(archives), executor, first=None).exit_code == ExitCode.OK
    assert [name.partition("/")[0] for name in executor.taken] == ["train"] * 3 + ["val"]


def test_a_run_that_ends_in_between_continues(archives: Path, tmp_path: Path) -> None:
    cancel = Cancel()
    stopped = after(tmp_path, "val.manifest.tsv", lambda: cancel.request(signal.SIGTERM))
    extract = stopped.behave

    def behave(shard: Shard, task: RunShard) -> Outcome | None:
        outcome = extract(shard, task)
        return failed(shard, "stopped") if cancel.requested else outcome

    stopped.behave = behave
    summary = go(tmp_path, both(archives), stopped, cancel=cancel)
    assert summary.exit_code == ExitCode.SIGTERM
    assert {name: split.status for name, split in summary.splits.items()} == {"train": "incomplete", "val": "published"}
    again = Obedient()
    assert go(tmp_path, both(archives), again).exit_code == ExitCode.OK
    assert len(again.taken) == 1
    assert published(tmp_path) == ["train", "val"]


@pytest.mark.parametrize(("bad", "good"), [("train", "val"), ("val", "train")])
def test_a_split_that_fails_does_not_keep_the_other_from_being_published(
    archives: Path, tmp_path: Path, bad: str, good: str
) -> None:
    executor = Obedient(lambda shard, task: failed(shard, "archive") if shard.split == bad else task(shard))
    assert go(tmp_path, both(archives), executor).exit_code == ExitCode.SHARDS_FAILED
    assert published(tmp_path) == [good]


def test_nothing_is_published_before_all_is_planned(archives: Path, tmp_path: Path) -> None:
    """An archive that turns out to be damaged late leaves nothing behind, though another split is whole."""
    executor = Obedient()

    def damaged(_: tuple[int, ...] | None) -> SplitPlan:
        while not executor.pauses:  # until train is done
            pass
        raise ArchiveError("val is damaged")

    summary = go(tmp_path, {"train": train(archives), "val": damaged}, executor, first="train")
    assert summary.exit_code == ExitCode.CANNOT_START
    assert published(tmp_path) == []


def test_a_split_that_is_planned_late_goes_before_what_is_left(archives: Path, tmp_path: Path) -> None:
    planned = threading.Event()
    executor = Obedient()

    def behave(shard: Shard, task: RunShard) -> Outcome:
        outcome = task(shard)
        planned.wait(20)
        return outcome

    executor.behave = behave

    def slow(asked: tuple[int, ...] | None) -> SplitPlan:
        while not executor.taken:
            pass
        try:
            return val_plan(archives / "val.tar", asked=asked)
        finally:
            threading.Timer(0.1, planned.set).start()  # the plan is there a moment after it was returned

    assert go(tmp_path, {"train": train(archives), "val": slow}, executor).exit_code == ExitCode.OK
    assert [name.partition("/")[0] for name in executor.taken] == ["train", "val", "train", "train"]


def test_parts_keep_to_the_order_and_publish_nothing(archives: Path, tmp_path: Path) -> None:
    for index in range(2):
        executor = Obedient()
        part = Part(index=index, count=2)
        assert go(tmp_path, both(archives), executor, part=part).exit_code == ExitCode.OK
        splits = [name.partition("/")[0] for name in executor.taken]
        assert splits == sorted(splits, reverse=True)
        assert published(tmp_path) == []
    assert go(tmp_path, both(archives), Obedient()).exit_code == ExitCode.OK
    assert published(tmp_path) == ["train", "val"]


def test_the_last_job_publishes_what_is_whole_before_it_does_what_a_lost_part_left(
    archives: Path, tmp_path: Path
) -> None:
    part = Part(index=0, count=2)
    taken = Obedient(lambda shard, task: task(shard) if shard.split == "val" else failed(shard, "stopped"))
    for each in (part, replace(part, index=1)):
        go(tmp_path, both(archives), taken, part=each)

    def behave(shard: Shard, task: RunShard) -> Outcome:
        wait_for(tmp_path / "val")
        return task(shard)

    assert go(tmp_path, both(archives), Obedient(behave)).exit_code == ExitCode.OK
    assert published(tmp_path) == ["train", "val"]


class TestCommand:
    def test_another_run_of_val_goes_on_when_it_is_published(self, base: Path, tmp_path: Path) -> None:
        first = Run(base, tmp_path, *SLOW, "--first", "val").at_work()
        second = Run(base, tmp_path, "--wait", "--splits", "val")
        code, result, err = second.end()
        assert code == 0, err
        assert result["splits"]["val"]["status"] == "published"
        assert first.process.poll() is None
        assert not (tmp_path / "train").exists()
        first.process.terminate()
        assert first.end()[0] == ExitCode.SIGTERM

    def test_without_durability_val_is_first(self, base: Path, tmp_path: Path, expected: Tree) -> None:
        run = Run(base, tmp_path, *SLOW, "--durability", "none", "--progress", "log").at_work()
        wait_for(tmp_path / "val")
        assert not (tmp_path / "train").exists()
        run.process.kill()
        run.process.communicate()
        code, result, err = Run(base, tmp_path, "--durability", "none").end()
        assert code == 0, err
        assert result["splits"]["val"]["shards_skipped"] == result["splits"]["val"]["shards"]
        assert tree(tmp_path) == expected

    @pytest.mark.parametrize("options", [("--splits", "train"), ("--splits", "train,test")])
    def test_a_split_that_is_not_asked_for(self, base: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
        assert cli.main(["--base-dir", str(base), "--target-dir", str(tmp_path), "--first", "val", *options]) in (2, 5)
        assert not (tmp_path / STATE_FOLDER).exists()

    def test_streams_of_their_own(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """val's stream is read beside train's, and published when it has been read."""
        spec = SynthSpec(classes=4, images_per_class=30, val_images=6, mean_bytes=20_000)
        write_files(tmp_path, files_of("hf-targz", spec))
        target = tmp_path / "target"
        run = Run(tmp_path, target, *SLOW, "--first", "val", "--durability", "none")
        wait_for(target / "val")
        assert not (target / "train").exists()
        code, result, err = run.end()
        assert code == 0, err
        assert {split["status"] for split in result["splits"].values()} == {"published"}

    def test_one_stream_for_both(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        spec = SynthSpec(classes=4, images_per_class=6, val_images=12, mean_bytes=2000)
        write_files(tmp_path, files_of("kaggle-targz", spec))
        target = tmp_path / "target"
        options = ["--base-dir", str(tmp_path), "--target-dir", str(target), "--first", "val", "--json"]
        assert cli.main(options) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["splits"]["val"]["status"] == "published"
        assert "holds val and train" in err
