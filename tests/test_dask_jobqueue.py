"""The recipes of docs/clusters.md for dask-jobqueue, run as they are printed on a real Slurm."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from program import tree
from slurm_cluster import Slurm

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
pytest.importorskip("dask_jobqueue", reason="needs the extra [jobqueue]")


def recipe(name: str, folder: Path, base: Path, changes: dict[str, str]) -> Path:
    """Write the recipe of the page that uses the class `name` into a file, for this machine."""
    page = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    [text] = [block for block in re.findall(r"(?ms)^```python\n(.*?)^```$", page) if f"import {name}\n" in block]
    for old, new in {"/archives": str(base), "/scratch/ImageNet": str(folder / "t"), **changes}.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = folder / "unpack.py"
    path.write_text(text)
    return path


def test_workers_as_jobs(slurm: Slurm, base: Path, expected: dict[str, str], tmp_path: Path) -> None:
    fewer = {"cores=8, processes=8": "cores=2, processes=2", "jobs=4": "jobs=2"}
    script = recipe("SLURMCluster", tmp_path, base, fewer)
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env={**slurm.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=200, check=False,
    )  # fmt: skip
    logs = "\n".join(path.read_text() for path in tmp_path.glob("slurm-*.out"))
    assert done.returncode == 0, done.stderr + logs
    assert tree(tmp_path / "t") == expected
    assert "Start worker" in logs  # the work was done in the jobs
    for job in re.findall(r"slurm-(\d+)", " ".join(path.name for path in tmp_path.glob("slurm-*.out"))):
        assert slurm.wait(job, "CANCELLED", "COMPLETED", "FAILED")


def test_all_in_one_allocation(slurm: Slurm, base: Path, expected: dict[str, str], tmp_path: Path) -> None:
    script = recipe("SLURMRunner", tmp_path, base, {})
    text = f"#!/bin/bash\n#SBATCH --ntasks=4 --nodes=2 --mem=2G\nexec srun {sys.executable} {script}\n"
    job = slurm.call("sbatch", "--parsable", f"--chdir={tmp_path}", text=text, environ={"PYTHONPATH": str(ROOT)})
    state = slurm.wait(job, "COMPLETED", "FAILED", seconds=200)
    log = (tmp_path / f"slurm-{job}.out").read_text()
    assert state == "COMPLETED", log
    assert tree(tmp_path / "t") == expected
