from __future__ import annotations

import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from imagenet_unpack.cli import main as cli
from imagenet_unpack.cli.batch import Resources, part_of, slurm_script
from imagenet_unpack.errors import UsageError

SLURM = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}


def slurm(index: int, low: int, high: int, count: int) -> dict[str, str]:
    numbers = {"ID": index, "MIN": low, "MAX": high, "COUNT": count}
    return SLURM | {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in numbers.items()}


@pytest.mark.parametrize(
    ("environ", "index", "count"),
    [
        (slurm(0, 0, 7, 8), 0, 8),
        (slurm(7, 0, 7, 8), 7, 8),
        (slurm(3, 1, 4, 4), 2, 4),
        (slurm(0, 0, 0, 1), 0, 1),
        (SLURM | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_NTASKS": "5"}, 2, 5),
        ({"LSB_JOBINDEX": "3", "LSB_JOBINDEX_END": "6"}, 2, 6),
        ({"SGE_TASK_ID": "2", "SGE_TASK_FIRST": "1", "SGE_TASK_LAST": "4", "SGE_TASK_STEPSIZE": "1"}, 1, 4),
    ],
)
def test_what_the_variables_say(environ: dict[str, str], index: int, count: int) -> None:
    part = part_of(environ)
    assert (part.index, part.count) == (index, count)
    assert part.source


@pytest.mark.parametrize(
    ("environ", "word"),
    [
        ({}, "--part I/N"),
        (SLURM, "--part I/N"),
        (slurm(3, 1, 4, 3), "gaps"),
        (slurm(4, 0, 8, 3), "gaps"),
        (slurm(7, 7, 7, 1), "part of more"),
        (
            {"SGE_TASK_ID": "3", "SGE_TASK_FIRST": "1", "SGE_TASK_LAST": "7", "SGE_TASK_STEPSIZE": "2"},
            "$((SGE_TASK_ID - 1))/N",
        ),
        ({"SGE_TASK_ID": "undefined"}, "--part I/N"),
        ({"PBS_ARRAY_INDEX": "3"}, "$PBS_ARRAY_INDEX"),
        ({"LSB_JOBINDEX": "3", "LSB_JOBINDEX_END": "7", "LSB_JOBINDEX_STEP": "2"}, "$((LSB_JOBINDEX - 1))/N"),
        ({"LSB_JOBINDEX": "0", "LSB_JOBINDEX_END": "0"}, "--part I/N"),
    ],
)
def test_what_they_leave_open_is_refused(environ: dict[str, str], word: str) -> None:
    with pytest.raises(UsageError, match="--part") as caught:
        part_of(environ)
    assert word in str(caught.value)


NASTY = ["--base-dir", "/data/it's here; rm -rf $HOME", "--target-dir", 'a "b" `c` \\d', "--classes", "0-9"]
NASTY += ["--source", "two\nEND_OF_PARTS\nlines", "--source", "not UTF-8: \udcff\udcfe", "--source", "bell \a, é"]


def scripts() -> dict[str, str]:
    nasty = Resources(account="a b", job_name='it\'s "x"')
    return {
        "one": slurm_script("/usr/bin/python3", NASTY, Resources(), "/work dir"),
        "parts": slurm_script("/usr/bin/python3", NASTY, Resources(parts=4), "/work dir"),
        "nasty": slurm_script("/usr/bin/python3", NASTY, nasty, "/"),
        "restart": slurm_script("/usr/bin/python3", [*NASTY, "--restart"], nasty, "/"),
    }


@pytest.mark.parametrize("name", ["one", "parts", "nasty", "restart"])
def test_scripts_are_shell(name: str, tmp_path: Path) -> None:
    path = tmp_path / "job.sh"
    path.write_text(scripts()[name])
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: bash -n alone has looked")
    subprocess.run(["shellcheck", path], check=True)
    for inner in scripts()[name].split("<<'END_OF_")[1:]:
        body = inner.partition("\n")[2].partition("\nEND_OF_")[0] + "\n"
        path.write_text(body)
        subprocess.run(["shellcheck", path], check=True)


def words(path: Path) -> list[str]:
    return os.fsdecode(path.read_bytes()).split("\0")[:-1]


def test_a_script_runs_its_command_with_every_word_as_it_was(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/bash\nprintf "%s\\0" "$@" > "$OUT"\nexit "$CODE"\n')
    fake.chmod(0o755)
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$@" > "$OUT.requeue"\n')
    (tmp_path / "scontrol").chmod(0o755)
    out = tmp_path / "out"
    for code in (0, 5, 138):
        environ = {
            "PATH": f"{tmp_path}:/usr/bin:/bin", "OUT": str(out), "CODE": str(code), "SLURM_CPUS_PER_TASK": "3",
            "SLURM_JOB_ID": "42",
        }  # fmt: skip
        script = slurm_script(str(fake), NASTY, Resources(), "/")
        done = subprocess.run(["bash"], input=script, text=True, env=environ, check=False)
        assert done.returncode == code
        assert words(out) == ["-m", "imagenet_unpack", *NASTY, "--workers", "3"]
        assert Path(f"{out}.requeue").exists() == (code == 138)
    assert Path(f"{out}.requeue").read_text().split() == ["requeue", "42"]


def test_parts_and_the_last_job_run_the_command_with_every_word_as_it_was(tmp_path: Path) -> None:
    """With an sbatch that runs each job at once, as the first element of its array."""
    for name, text in {
        "python": 'printf "%s\\0" "$@" > "$OUT.$JOB"\n',
        "sbatch": 'echo x >> "$OUT.jobs"\nexport JOB=$(wc -l < "$OUT.jobs")\nbash >&2 && echo "$JOB"\n',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "OUT": str(tmp_path / "out"), "SLURM_CPUS_PER_TASK": "3",
               "SLURM_ARRAY_TASK_ID": "0"}  # fmt: skip
    script = slurm_script(str(tmp_path / "python"), NASTY, Resources(parts=4), "/")
    done = subprocess.run(["bash"], input=script, text=True, env=environ, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, "parts: job 1; check and publish: job 2\n"), done.stderr
    common = ["-m", "imagenet_unpack", *NASTY, "--workers", "3"]
    assert words(tmp_path / "out.1") == [*common, "--part", "0/4"]
    assert words(tmp_path / "out.2") == [*common, "--part", "0/1"]


def test_no_parts_are_left_without_a_job_that_publishes(tmp_path: Path) -> None:
    for name, text in {
        "sbatch": '[[ "$*" != *dependency* ]] || exit 1\necho "17;cluster"\n',
        "scancel": 'echo "$@" >> "$OUT"\n',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "OUT": str(tmp_path / "out")}
    script = slurm_script("/usr/bin/python3", [], Resources(parts=4), "/")
    assert subprocess.run(["bash"], input=script, text=True, env=environ, check=False).returncode == 1
    assert (tmp_path / "out").read_text() == "17\n"


def test_a_job_that_is_requeued_does_not_begin_again(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/bash\nprintf "%s\\0" "$@" > "$OUT"\n')
    fake.chmod(0o755)
    script = slurm_script(str(fake), ["--restart", "--splits", "val"], Resources(), "/")
    for count, first in ("", ["--restart"]), ("0", ["--restart"]), ("1", []):
        environ = {"PATH": "/usr/bin:/bin", "OUT": str(tmp_path / "out"), "SLURM_CPUS_PER_TASK": "3",
                   "SLURM_RESTART_COUNT": count}  # fmt: skip
        subprocess.run(["bash"], input=script, text=True, env=environ, check=True)
        assert words(tmp_path / "out") == ["-m", "imagenet_unpack", *first, "--splits", "val", "--workers", "3"]


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_script_hands_signals_on_and_keeps_the_exit_code(tmp_path: Path, name: str) -> None:
    fake = tmp_path / "python"
    fake.write_text(
        f"#!{sys.executable}\nimport os, signal, time\n"
        f"signal.signal(signal.SIG{name}, lambda *_: (time.sleep(0.3), os._exit(77)))\n"
        f"open({str(tmp_path / 'up')!r}, 'w')\nfor _ in range(600): time.sleep(0.05)\n"
    )
    fake.chmod(0o755)
    path = tmp_path / "job.sh"
    path.write_text(slurm_script(str(fake), [], Resources(), "/"))
    with subprocess.Popen(["bash", path], env={"PATH": "/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "1"}) as process:
        while not (tmp_path / "up").exists():
            assert process.poll() is None
        process.send_signal({"USR1": 10, "TERM": 15}[name])
        assert process.wait(timeout=10) == 77


class TestCommand:
    def sbatch(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(["sbatch", *arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    def test_prints_this_very_command_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--splits", "val", "--base-dir", "/a b", "--max-write-rate", "200MB"]
        code, out, _ = self.sbatch(capsys, *arguments, "--workers", "12", "--account", "proj", "--time", "30")
        assert code == 0
        assert shlex.join([sys.executable, "-m", "imagenet_unpack", *arguments]) in out
        for line in ("--cpus-per-task=12", "--account=proj", "--time=30", "--requeue", "--signal=B:USR1@120"):
            assert f"#SBATCH {line}\n" in out
        assert "--open-mode=append" in out

    def test_parts(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = self.sbatch(capsys, "--parts", "6")
        assert code == 0
        assert "#SBATCH --array=0-5\n" in out
        assert '--part "$SLURM_ARRAY_TASK_ID/6"' in out
        assert "--part 0/1" in out
        assert "--kill-on-invalid-dep=yes" in out

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--no-such"],
            ["--layout", "names"],
            ["--parts", "0"],
            ["--part", "1/2"],
            ["--job-name", "a\nb"],
            ["--source", "-"],
            ["--source=-"],
            ["--consume"],
            ["--consume", "--yes", "--parts", "2"],
            ["--durability", "none", "--parts", "2"],
            ["--restart", "--parts", "2"],
            ["--repair", "--parts", "2"],
            ["--executor", "dask"],
            ["--job-name", "a/b"],
        ],
    )
    def test_refuses_what_would_fail_in_the_queue(
        self, capsys: pytest.CaptureFixture[str], arguments: list[str]
    ) -> None:
        code, out, err = self.sbatch(capsys, *arguments)
        assert code == 2
        assert out == ""
        assert len(err.splitlines()) == 1


def test_a_folder_in_which_slurm_cannot_write_a_log() -> None:
    with pytest.raises(UsageError, match="backslash"):
        slurm_script("/usr/bin/python3", [], Resources(), "/work\\dir")


def test_parts_are_balanced_by_bytes() -> None:
    from factory import WNIDS

    from imagenet_unpack.dataset import ilsvrc2012
    from imagenet_unpack.model import ArchiveId, Shard, class_refs
    from imagenet_unpack.planning import planner

    archive = ArchiveId(path="", size_bytes=1, mtime_ns=0, headers="", official=True)
    refs = class_refs(WNIDS, "index")
    shards = [
        Shard(id=WNIDS[i], split="train", archive=archive, offset=0, end=size, classes=(refs[i],))
        for i, size in enumerate(ilsvrc2012.train_inner_tar_bytes())
    ]
    for count in (2, 8, 33):
        parts = planner.cut(shards, count)
        loads = [sum(shard.size_bytes for shard in part) for part in parts]
        assert max(loads) <= min(loads) * 1.03
        assert sorted(shard.id for part in parts for shard in part) == sorted(WNIDS)
        random.shuffle(shards)
        assert planner.cut(shards, count) == parts
