"""Parts `I/N` of one plan: together they do the whole, and the run without a part checks and publishes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from factory import END, images, member, tar, train_plan, train_tar, val_plan
from program import SLOW, SPEC, Run, Tree, serial, tree

from imagenet_unpack.cli import main as cli
from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.errors import ExitCode
from imagenet_unpack.model import Part, RunSummary, SplitName
from imagenet_unpack.planning import planner
from imagenet_unpack.planning.train import plan_train
from imagenet_unpack.reporter import NullReporter
from imagenet_unpack.run import runner
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.run.executors import SerialExecutor
from imagenet_unpack.run.runoptions import Options, Replan
from imagenet_unpack.targets.paths import STATE_FOLDER


def result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    value = json.loads(capsys.readouterr().out)
    assert isinstance(value, dict)
    return value


def test_parts_then_the_whole(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, target = tmp_path / "whole", tmp_path / "t"
    assert serial(base, whole) == 0
    shards = 0
    for index in (2, 0, 1):
        capsys.readouterr()
        assert serial(base, target, "--part", f"{index}/3", "--json") == 0
        part = result(capsys)
        shards += part["splits"]["train"]["shards"]
        assert part["splits"]["train"]["status"] == "incomplete"
        assert tree(target) == {}
        assert serial(base, target, "--part", f"{index}/3", "--json") == 0
        again = result(capsys)["splits"]
        assert all(split["shards_skipped"] == split["shards"] for split in again.values())
    assert shards == SPEC.classes
    assert serial(base, target, "--part", "0/1", "--json") == 0
    last = result(capsys)
    assert last["splits"]["train"]["shards_skipped"] == last["splits"]["train"]["shards"] == SPEC.classes
    assert tree(target) == tree(whole)
    assert (target / "val.manifest.tsv").read_bytes() == (whole / "val.manifest.tsv").read_bytes()
    assert serial(base, target, "--part", "1/3") == 0


def in_runs_of(run_bytes: int, base: Path, target: Path, part: Part) -> RunSummary:
    """Do a part where the validation archive is cut into shards of about so many bytes."""
    planners: dict[SplitName, Replan] = {
        "train": lambda asked: train_plan(base / ilsvrc2012.TRAIN_ARCHIVE_NAME, asked=asked),
        "val": lambda asked: val_plan(base / ilsvrc2012.VAL_ARCHIVE_NAME, asked=asked, run_bytes=run_bytes),
    }
    options = Options(target=target, layout="index", planners=planners, classes=None, part=part)
    return runner.run(options, SerialExecutor(), NullReporter(), Cancel())


def test_parts_share_a_validation_archive(base: Path, tmp_path: Path, expected: Tree) -> None:
    shards = []
    for index in (1, 2, 0):
        summary = in_runs_of(200_000, base, tmp_path, Part(index=index, count=3))
        shards.append(summary.splits["val"].shards)
        assert tree(tmp_path) == {}
    assert all(shards)
    other = in_runs_of(300_000, base, tmp_path, Part())
    assert other.exit_code == ExitCode.CANNOT_START
    assert "cut the work differently" in other.message
    whole = in_runs_of(200_000, base, tmp_path, Part())
    assert whole.splits["val"].shards_skipped == whole.splits["val"].shards == sum(shards)
    assert tree(tmp_path) == expected


def test_a_lost_part_is_done_by_the_last_run(base: Path, tmp_path: Path) -> None:
    whole, target = tmp_path / "whole", tmp_path / "t"
    assert serial(base, whole) == 0
    assert serial(base, target, "--part", "0/2") == 0
    assert serial(base, target) == 0
    assert tree(target) == tree(whole)


def test_parts_of_another_number_are_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serial(base, tmp_path, "--part", "0/2") == 0
    assert serial(base, tmp_path, "--part", "0/3") == 5
    assert "2 parts" in capsys.readouterr().err
    assert serial(base, tmp_path, "--part", "1/2", "--layout", "wnid") == 5
    assert serial(base, tmp_path, "--part", "1/2", "--restart") == 2
    assert serial(base, tmp_path) == 0


@pytest.mark.parametrize("text", ["2/2", "-1/2", "1", "a/b", "0/0", "1/2/3", ""])
def test_what_is_no_part(base: Path, tmp_path: Path, text: str) -> None:
    assert serial(base, tmp_path, f"--part={text}") == 2


def test_auto_says_what_it_took(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serial(base, tmp_path, "--part", "auto") == 2
    for name, value in {"ID": "1", "MIN": "0", "MAX": "1", "COUNT": "2"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert serial(base, tmp_path, "--part", "auto") == 0
    assert "part 1/2, from SLURM_ARRAY_TASK_ID" in capsys.readouterr().err
    assert (tmp_path / STATE_FOLDER / "train" / "1-of-2.journal").exists()


@pytest.mark.slow
def test_several_at_once(base: Path, tmp_path: Path) -> None:
    whole, target = tmp_path / "whole", tmp_path / "t"
    assert serial(base, whole) == 0
    first = Run(base, target, "--part", "0/2", "--max-write-rate", "100kB").at_work()
    code, _, err = Run(base, target, "--part", "0/2").end()
    assert code == 5
    assert str(first.process.pid) in err
    assert Run(base, target).end()[0] == 5  # it would publish while a part is at work
    assert Run(base, target, "--part", "1/2").end()[0] == 0
    first.process.terminate()
    assert first.end()[0] == 143
    assert Run(base, target, "--part", "0/2").end()[0] == 0
    assert Run(base, target).end()[0] == 0
    assert tree(target) == tree(whole)


def test_a_part_is_stopped_and_goes_on(base: Path, tmp_path: Path) -> None:
    part = Run(base, tmp_path, "--part", "1/2", *SLOW).at_work()
    time.sleep(1)
    part.process.terminate()
    assert part.end()[0] == 143
    assert Run(base, tmp_path, "--part", "1/2").end()[0] == 0
    assert Run(base, tmp_path, "--part", "0/2").end()[0] == 0
    assert Run(base, tmp_path).end()[0] == 0


def test_nothing_depends_on_a_thousand_classes(tmp_path: Path) -> None:
    """The shape of ImageNet-21K's archive: 19,167 inner tars of any wnids."""
    inner = member(b"n_0.JPEG", b"x") + END
    path = tmp_path / "winter21.tar"
    path.write_bytes(b"".join(member(b"n%08d.tar" % number, inner) for number in range(100, 100 + 19_167)) + END)
    command = ["plan", "--train-archive", str(path), "--splits", "train", "--layout", "wnid", "--any-wnids", "--json"]
    environ = {"PYTHONPATH": str(Path(cli.__file__).parents[2]), "PATH": "/usr/bin:/bin"}
    began_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "imagenet_unpack", *command], capture_output=True, text=True, check=True, env=environ
    )
    assert time.monotonic() - began_s < 10
    assert json.loads(done.stdout)["splits"]["train"]["classes"] == 19_167
    plan = plan_train(path, None, None, "wnid")
    assert plan.classes[0].folder == "n00000100"
    loads = [sum(shard.size_bytes for shard in part) for part in planner.cut(plan.shards, 8)]
    assert max(loads) - min(loads) <= len(inner)


def test_any_wnids_are_unpacked_by_wnid(tmp_path: Path) -> None:
    path = tmp_path / "other.tar"
    path.write_bytes(train_tar({wnid: tar(images(wnid, [b"x", b"y"])) for wnid in ("n00000002", "n00000001")}))
    command = ["--train-archive", str(path), "--splits", "train", "--target-dir", str(tmp_path / "t"), "--any-wnids"]
    assert cli.main([*command, "--executor", "serial"]) == 2
    assert cli.main([*command, "--executor", "serial", "--layout", "wnid"]) == 0
    assert len(tree(tmp_path / "t")) == 4
    assert cli.main(["check", str(tmp_path / "t"), "--deep"]) == 0
