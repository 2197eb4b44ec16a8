"""The printed batch scripts, submitted as they are to a real Slurm."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import slurm_cluster
from program import tree

from imagenet_unpack.cli import main as cli
from imagenet_unpack.targets.paths import STATE_FOLDER

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
PACKAGE = str(Path(cli.__file__).parents[2])
SLOW = ("--max-write-rate", "600kB")
BATCH = ("--workers", "2", "--memory", "500M")


class Desk:
    """A user's folder, from which jobs are submitted."""

    def __init__(self, slurm: slurm_cluster.Slurm, base: Path, folder: Path) -> None:
        self.slurm = slurm
        self.base = base
        self.folder = folder
        self.target = folder / "t"

    def script(self, *options: str) -> str:
        command = [sys.executable, "-m", "imagenet_unpack", "sbatch", "--base-dir", str(self.base)]
        environ = {**os.environ, "PYTHONPATH": PACKAGE}
        done = subprocess.run(
            [*command, "--target-dir", str(self.target), *BATCH, *options],
            cwd=self.folder, env=environ, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout

    def submit(self, script: str, *options: str) -> str:
        out = self.slurm.call("sbatch", "--parsable", *options, text=script, environ={"PYTHONPATH": PACKAGE})
        assert out.isdecimal(), out
        return out

    def at_work(self) -> None:
        staged = self.target / STATE_FOLDER / "train" / "tree"
        deadline = time.monotonic() + 60
        while not any(staged.glob("*/*.JPEG")):
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.05)

    def logs(self) -> str:
        return "\n".join(
            f"{path.name}:\n{path.read_text()}"
            for path in sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        )


@pytest.fixture
def desk(slurm: slurm_cluster.Slurm, base: Path, tmp_path: Path) -> Desk:
    return Desk(slurm, base, tmp_path)


def test_one_job(desk: Desk, expected: dict[str, str]) -> None:
    job = desk.submit(desk.script())
    assert desk.slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", desk.logs()
    assert tree(desk.target) == expected
    assert "with 2 workers" in desk.logs()


def test_a_folder_with_odd_characters(slurm: slurm_cluster.Slurm, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s "x" $HOME #1 %j é'
    folder.mkdir()
    (folder / "archives").symlink_to(base)
    desk = Desk(slurm, folder / "archives", folder)
    job = desk.submit(desk.script("--job-name", 'a #1 "b" %j', "--splits", "val"))
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", desk.logs()
    assert (folder / f'a #1 "b" %j-{job}.log').exists(), desk.logs()
    assert {path.name for path in desk.target.iterdir()} >= {"val", "val.manifest.tsv"}


@pytest.mark.parametrize("as_job", [False, True], ids=["by bash", "as a job"])
def test_parts_and_a_job_that_publishes(desk: Desk, expected: dict[str, str], as_job: bool) -> None:
    script = desk.script("--parts", "3")
    if as_job:
        launcher = desk.submit(script)
        assert desk.slurm.wait(launcher, "COMPLETED", "FAILED") == "COMPLETED", desk.logs()
        out = desk.logs()
    else:
        out = desk.slurm.call("bash", text=script, environ={"PYTHONPATH": PACKAGE})
    found = re.search(r"parts: job (\d+); check and publish: job (\d+)", out)
    assert found, out
    assert desk.slurm.wait(found[2], "COMPLETED", "FAILED") == "COMPLETED", desk.logs()
    assert desk.slurm.state(found[1]) == "COMPLETED"
    assert tree(desk.target) == expected
    parts = [path.name for path in desk.folder.glob(f"imagenet-{found[1]}_*.log")]
    assert len(parts) == 3


def test_cancelled_and_submitted_again(desk: Desk, expected: dict[str, str]) -> None:
    script = desk.script(*SLOW)
    job = desk.submit(script)
    desk.at_work()
    time.sleep(3)
    desk.slurm.call("scancel", job)
    desk.slurm.wait(job, "CANCELLED")
    assert "stopped by SIG" in desk.logs()  # by itself, not killed at the end of KillWait
    assert tree(desk.target) == {}
    again = desk.submit(desk.script())
    assert desk.slurm.wait(again, "COMPLETED", "FAILED") == "COMPLETED", desk.logs()
    assert tree(desk.target) == expected


def test_told_of_the_end_it_is_requeued_and_goes_on(desk: Desk, expected: dict[str, str]) -> None:
    job = desk.submit(desk.script(*SLOW))
    desk.at_work()
    time.sleep(4)
    desk.slurm.call("scancel", "-b", "-s", "USR1", job)  # as --signal=B:USR1@120 does
    assert desk.slurm.wait(job, "COMPLETED", "FAILED", seconds=180) == "COMPLETED", desk.logs()
    assert "Restarts=1" in desk.slurm.call("scontrol", "show", "job", job)
    assert tree(desk.target) == expected
    assert "stopped by SIG" in desk.logs()


COUNT = """
import json, sys
import imagenet_unpack
found = imagenet_unpack.samples(sys.argv[2], "train")
with open("seen.json", "w") as file:
    json.dump({path: len(open(path, "rb").read()) for path, _ in found}, file)
"""


def test_a_job_that_mounts_an_image(
    slurm: slurm_cluster.Slurm, base: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """The script of docs/image.md."""
    if not (shutil.which("squashfuse") and shutil.which("fusermount")):
        pytest.skip("needs squashfuse and fusermount (Debian: squashfuse, fuse3)")
    image = tmp_path / "ImageNet.sqfs"
    assert cli.main(["image", "--base-dir", str(base), "--output", str(image), "--progress", "none"]) == 0
    page = (Path(PACKAGE) / "docs" / "image.md").read_text(encoding="utf-8")
    [script] = re.findall(r"(?m)^    #!/bin/bash\n(?:    .*\n)+", page)
    script = textwrap.dedent(script)
    for old, new in ("/shared/imagenet/ImageNet.sqfs", str(image)), ("python ", f"{sys.executable} "):
        assert script.count(old) == 1
        script = script.replace(old, new)
    (tmp_path / "train.py").write_text(COUNT)
    options = (f"--chdir={tmp_path}", "--output=job.log")
    job = slurm.call("sbatch", "--parsable", *options, text=script, environ={"PYTHONPATH": PACKAGE})
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", (tmp_path / "job.log").read_text()
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert len(seen) == sum(path.startswith("train/") for path in expected)
    assert not [path for node in slurm.nodes for path in slurm.disk(node).glob("imagenet.*")]  # unmounted and removed


@pytest.mark.slow
def test_the_time_limit_itself(desk: Desk, expected: dict[str, str]) -> None:
    """One minute is the shortest limit; the signal comes up to a minute early, so here right at the start."""
    job = desk.submit(desk.script("--max-write-rate", "90kB", "--time", "2", "--signal-before", "60"))
    deadline = time.monotonic() + 240
    while "Restarts=1" not in desk.slurm.call("scontrol", "show", "job", job):
        assert time.monotonic() < deadline, desk.logs()
        time.sleep(1)
    assert "stopped by SIG" in desk.logs()
    desk.slurm.call("scancel", job)
    desk.slurm.wait(job, "CANCELLED")
    again = desk.submit(desk.script())
    assert desk.slurm.wait(again, "COMPLETED", "FAILED") == "COMPLETED", desk.logs()
    assert tree(desk.target) == expected


def test_a_signal_to_an_srun_step(desk: Desk, expected: dict[str, str]) -> None:
    """Plain --signal=USR1@n reaches steps alone: a script that starts the program with srun sees it so."""
    program = f"{sys.executable} -m imagenet_unpack --base-dir {desk.base} --target-dir {desk.target}"
    script = f"#!/bin/bash\n#SBATCH --chdir={desk.folder} --ntasks=1 --mem=500M\nsrun -n 1 {program} "
    job = desk.submit(script + " ".join(SLOW) + "\n")
    desk.at_work()
    time.sleep(2)
    desk.slurm.call("scancel", "-s", "USR1", job)
    desk.slurm.wait(job, "COMPLETED", "FAILED")
    assert tree(desk.target) == {}
    again = desk.submit(script + "\n")
    assert desk.slurm.wait(again, "COMPLETED", "FAILED") == "COMPLETED", desk.logs()
    assert tree(desk.target) == expected


def test_a_lost_part_is_done_by_the_last_job(desk: Desk, expected: dict[str, str]) -> None:
    out = desk.slurm.call("bash", text=desk.script("--parts", "2", *SLOW), environ={"PYTHONPATH": PACKAGE})
    found = re.search(r"parts: job (\d+); check and publish: job (\d+)", out)
    assert found, out
    desk.at_work()
    desk.slurm.call("scancel", f"{found[1]}_1")
    assert desk.slurm.wait(found[2], "COMPLETED", "FAILED", seconds=180) == "COMPLETED", desk.logs()
    assert tree(desk.target) == expected


def test_a_part_that_is_requeued_holds_the_last_job_up(desk: Desk, expected: dict[str, str]) -> None:
    out = desk.slurm.call("bash", text=desk.script("--parts", "2", *SLOW), environ={"PYTHONPATH": PACKAGE})
    found = re.search(r"parts: job (\d+); check and publish: job (\d+)", out)
    assert found, out
    desk.at_work()
    desk.slurm.call("scancel", "-b", "-s", "USR1", f"{found[1]}_1")
    assert desk.slurm.wait(found[2], "COMPLETED", "FAILED", seconds=180) == "COMPLETED", desk.logs()
    assert desk.slurm.state(found[1]) == "COMPLETED"
    assert "Restarts=1" in desk.slurm.call("scontrol", "show", "job", f"{found[1]}_1")
    assert "continuing train: 8 of 8 classes" in desk.logs()  # by the last job: it began when the part was done
    assert tree(desk.target) == expected


def test_a_part_that_fails_keeps_its_split_from_being_published(desk: Desk, expected: dict[str, str]) -> None:
    archives = desk.folder / "archives"
    shutil.copytree(desk.base, archives)
    damage(archives / "ILSVRC2012_img_train.tar")
    desk.base = archives
    out = desk.slurm.call("bash", text=desk.script("--parts", "2"), environ={"PYTHONPATH": PACKAGE})
    found = re.search(r"parts: job (\d+); check and publish: job (\d+)", out)
    assert found, out
    assert desk.slurm.wait(found[2], "COMPLETED", "FAILED") == "FAILED", desk.logs()
    assert "ExitCode=3:0" in desk.slurm.call("scontrol", "show", "job", found[2])
    last = next(desk.folder.glob("imagenet-publish-*.log")).read_text()
    assert "n01440764" in last  # it says which class
    assert tree(desk.target) == {path: digest for path, digest in expected.items() if path.startswith("val/")}


def damage(train: Path) -> None:
    """Overwrite the checksum of a header in the first inner tar."""
    with open(train, "r+b") as file:
        file.seek(512 + 148)
        file.write(b"0000000\0")


def test_auto_in_an_array_of_ones_own(desk: Desk, expected: dict[str, str]) -> None:
    program = f"{sys.executable} -m imagenet_unpack --base-dir {desk.base} --target-dir {desk.target}"
    script = f"#!/bin/bash\n#SBATCH --chdir={desk.folder} --array=1-3 --mem=500M\n{program} --part auto\n"
    job = desk.submit(script)
    assert desk.slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", desk.logs()
    assert "from SLURM_ARRAY_TASK_ID" in desk.logs()
    last = desk.submit(f"#!/bin/bash\n#SBATCH --chdir={desk.folder} --mem=500M\n{program}\n")
    assert desk.slurm.wait(last, "COMPLETED", "FAILED") == "COMPLETED", desk.logs()
    assert tree(desk.target) == expected


def test_auto_in_srun_tasks_and_one_element_again(desk: Desk, expected: dict[str, str]) -> None:
    program = f"{sys.executable} -m imagenet_unpack --base-dir {desk.base} --target-dir {desk.target} --part auto"
    lone = desk.submit(f"#!/bin/bash\n#SBATCH --chdir={desk.folder} --array=2 --mem=500M\n{program}\n")
    desk.slurm.wait(lone, "FAILED")
    assert "was it a part of more" in desk.logs()
    script = f"#!/bin/bash\n#SBATCH --chdir={desk.folder} --ntasks=2 --mem=900M\nsrun -n 2 {program}\n"
    job = desk.submit(script)
    assert desk.slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", desk.logs()
    assert tree(desk.target) == {}
    last = desk.submit(script.replace("srun -n 2 ", "").replace("--part auto", "--part 0/1"))
    assert desk.slurm.wait(last, "COMPLETED", "FAILED") == "COMPLETED", desk.logs()
    assert tree(desk.target) == expected
