"""The job script of docs/clusters.md for Grid Engine, submitted as it is printed to a real one."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gridengine_cluster import GridEngine, missing
from program import tree

from imagenet_unpack.targets.paths import STATE_FOLDER

ROOT = Path(__file__).resolve().parent.parent
SLOW = ("--max-write-rate", "600kB")

pytestmark = [pytest.mark.gridengine, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def grid() -> Iterator[GridEngine]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="grid") as name:
        engine = GridEngine(Path(name))
        try:
            engine.start()
            yield engine
        finally:
            engine.end()


class Desk:
    """A user's folder with the script of the page, from which jobs are submitted."""

    def __init__(self, grid: GridEngine, base: Path, folder: Path) -> None:
        self.grid = grid
        self.folder = folder
        self.target = folder / "t"
        page = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
        [script] = re.findall(r"(?ms)^```bash\n(#!/bin/bash\n#\$.*?)^```$", page)
        for old, new in ("/archives", base), ("/scratch/ImageNet", self.target), ("smp 16", "smp 2"):
            assert script.count(old) == 1
            script = script.replace(old, str(new))
        (folder / "unpack.sh").write_text(script)

    def submit(self, *options: str, arguments: tuple[str, ...] = ()) -> str:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        command = ["qsub", "-terse", "-wd", str(self.folder), "-v", f"PATH={path},PYTHONPATH={ROOT}", *options]
        return self.grid.run(*command, str(self.folder / "unpack.sh"), *arguments).partition(".")[0]

    def at_work(self) -> None:
        staged = self.target / STATE_FOLDER / "train" / "tree"
        deadline = time.monotonic() + 60
        while not any(staged.glob("*/*.JPEG")):
            assert time.monotonic() < deadline, self.log("*")
            time.sleep(0.05)

    def log(self, name: str) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob(f"{name}.o*")))


@pytest.fixture
def desk(grid: GridEngine, base: Path, tmp_path: Path) -> Desk:
    return Desk(grid, base, tmp_path)


def test_an_array_of_parts_and_a_job_that_publishes(desk: Desk, expected: dict[str, str]) -> None:
    desk.submit("-N", "parts", "-t", "1-3", arguments=("--part", "auto"))
    last = desk.submit("-N", "publish", "-hold_jid", "parts")
    desk.grid.wait(last)
    parts = desk.log("parts")
    for index in range(3):
        assert f"part {index}/3, from SGE_TASK_ID of 1-3" in parts, parts
    assert tree(desk.target) == expected, desk.log("*")


def test_a_deleted_element_is_done_by_the_last_job(desk: Desk, expected: dict[str, str]) -> None:
    parts = desk.submit("-N", "parts", "-t", "1-3", arguments=("--part", "auto", *SLOW))
    last = desk.submit("-N", "publish", "-hold_jid", "parts")
    desk.at_work()
    desk.grid.run("qdel", parts, "-t", "2")
    desk.grid.wait(last)
    assert "SIGUSR2" in desk.log("parts"), desk.log("*")  # told before it was killed
    done = re.search(r"continuing train: (\d+) of 8 classes are already done", desk.log("publish"))
    assert done, desk.log("*")
    assert 0 < int(done[1]) < 8  # it says what it found and did the rest
    assert tree(desk.target) == expected


def test_at_the_soft_limit_it_goes_back_into_the_queue_and_continues(desk: Desk, expected: dict[str, str]) -> None:
    job = desk.submit("-l", "s_rt=6,h_rt=60", arguments=SLOW)
    desk.grid.wait(job)
    assert desk.log("imagenet").count("extracting: ") == 2, desk.log("imagenet")
    # Grid Engine does not put a job back twice where it restarts on the same host.
    desk.grid.wait(desk.submit())
    log = desk.log("imagenet")
    assert "SIGUSR1" in log
    assert tree(desk.target) == expected, log


@pytest.mark.parametrize("tasks", ["2", "1-5:2"], ids=["one element again", "a step"])
def test_auto_refuses_an_array_that_is_not_one_to_n(desk: Desk, tasks: str) -> None:
    job = desk.submit("-t", tasks, arguments=("--part", "auto"))
    desk.grid.wait(job)
    assert "write --part $((SGE_TASK_ID - 1))/N" in desk.log("imagenet")
    assert not desk.target.exists()
