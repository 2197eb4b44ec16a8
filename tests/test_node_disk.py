"""The job script for a node's own disk, run as docs/clusters.md prints it, with archives that are slow to read."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from passthrough import passthrough
from program import tree
from slurm_cluster import Slurm

ROOT = Path(__file__).resolve().parent.parent
TASKS = 8
# Stands for the training: each task writes what it was given, and when it was started.
TRAIN = """
import json, os, sys, time
me = os.environ["SLURM_PROCID"]
with open(f"task{me}.json", "w") as file:
    json.dump({"node": os.environ["SLURMD_NODENAME"], "data": sys.argv[1], "started": time.time()}, file)
"""

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


@pytest.fixture
def slow_archives(base: Path, tmp_path: Path) -> Iterator[Path]:
    """The archives on a file system that lets 3 MB/s through, all its readers together."""
    if shutil.which("bindfs") is None:
        pytest.skip("needs bindfs (Debian: bindfs) for a slow file system")
    mount = tmp_path / "archives"
    with passthrough(base, mount, "--read-rate=3M"):
        yield mount


@pytest.fixture
def empty_disks(slurm: Slurm) -> Iterator[None]:
    yield
    for node in slurm.nodes:
        shutil.rmtree(slurm.disk(node) / "ImageNet", ignore_errors=True)


def script_of_the_page(archives: Path) -> str:
    page = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    [script] = re.findall(r"(?ms)^```bash\n(#!/bin/bash\n#SBATCH.*?)^```$", page)
    assert f"--ntasks-per-node={TASKS}\n" in script
    changed: str = script.replace("ARCHIVES=/archives\n", f"ARCHIVES={archives}\n")
    assert changed != script
    return changed


def submit(slurm: Slurm, folder: Path, script: str, *options: str) -> str:
    path = f"{Path(sys.executable).parent}:{slurm.environ['PATH']}"
    environ = {"PYTHONPATH": str(ROOT), "PATH": path}
    job = slurm.call("sbatch", "--parsable", f"--chdir={folder}", *options, text=script, environ=environ)
    assert job.isdecimal(), job
    return job


@pytest.mark.usefixtures("empty_disks")
@pytest.mark.parametrize("nodes", [1, 4])
def test_each_node_unpacks_once_then_all_tasks_train(
    slurm: Slurm, slow_archives: Path, expected: dict[str, str], tmp_path: Path, nodes: int
) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    job = submit(slurm, tmp_path, script_of_the_page(slow_archives), f"--nodes={nodes}")
    state = slurm.wait(job, "COMPLETED", "FAILED")
    log = (tmp_path / f"slurm-{job}.out").read_text()
    assert state == "COMPLETED", log

    tasks = [json.loads(path.read_text()) for path in tmp_path.glob("task*.json")]
    used = slurm.nodes[:nodes]
    assert sorted(task["node"] for task in tasks) == sorted(used * TASKS)
    for node in used:
        disk = slurm.disk(node) / "ImageNet"
        assert {task["data"] for task in tasks if task["node"] == node} == {str(disk)}
        assert tree(disk) == expected
        # Every task of the node ended its unpacking, one with work done; the manifest was there before any trained.
        done = re.findall(rf"done in .* {re.escape(str(disk))}: (.*)", log)
        assert len(done) == TASKS, log
        assert sum("nothing to do" not in line for line in done) == 1, log
        published = max((disk / f"{split}.manifest.tsv").stat().st_mtime for split in ("train", "val"))
        assert published < min(task["started"] for task in tasks)


@pytest.mark.usefixtures("empty_disks")
def test_no_task_trains_where_a_node_could_not_unpack(slurm: Slurm, base: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    slurm.disk("node1").joinpath("ImageNet").write_text("in the way")
    try:
        job = submit(slurm, tmp_path, script_of_the_page(base), "--nodes=2")
        assert slurm.wait(job, "COMPLETED", "FAILED") == "FAILED"
    finally:
        slurm.disk("node1").joinpath("ImageNet").unlink()
    assert not list(tmp_path.glob("task*.json"))
    assert str(slurm.disk("node1")) in (tmp_path / f"slurm-{job}.out").read_text()
