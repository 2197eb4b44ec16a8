"""What the program does when its output is full, closed or knows ASCII alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from factory import tar

from imagenet_unpack.cli import main as cli
from imagenet_unpack.dataset.synth import SynthSpec, write_archives
from imagenet_unpack.errors import ExitCode

SPEC = SynthSpec(classes=3, images_per_class=4, val_images=6, mean_bytes=2000)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    write_archives(folder, SPEC)
    return folder


def shell(command: str, **environ: str) -> tuple[int, str, str]:
    """Run a command line of bash in which `$P` is the program; return exit code, stdout and stderr."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    env |= {"P": f"{sys.executable} -m imagenet_unpack"} | environ
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, check=False, env=env)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def tree(archives: Path, tmp_path: Path) -> Path:
    code, _, _ = shell(f"$P --base-dir {archives} --target-dir {tmp_path}/tree --executor serial")
    assert code == 0
    return tmp_path / "tree"


@pytest.mark.parametrize("where", ["> /dev/full", ">&-"])
class TestStandardOutputThatCannotBeWritten:
    @pytest.mark.parametrize("command", ["plan --base-dir {archives}", "sbatch", "plan --base-dir {archives} --json"])
    def test_is_one_line_and_6(self, archives: Path, command: str, where: str) -> None:
        code, _, err = shell(f"$P {command.format(archives=archives)} --progress none {where}")
        assert code == ExitCode.STOPPED
        (line,) = (line for line in err.splitlines() if not line.startswith("note:"))
        assert "standard output" in line
        assert "defect" not in line

    def test_does_not_change_what_a_check_found(self, tree: Path, where: str) -> None:
        next((tree / "train" / "1").iterdir()).unlink()
        for option in ("", "--json"):
            code, _, err = shell(f"$P check {tree} {option} --progress none {where}")
            assert code == ExitCode.CHECK_DIFFERS
            assert len(err.splitlines()) == 1

    def test_a_run_whose_result_cannot_be_told_has_not_done_all_it_was_asked_for(
        self, archives: Path, tmp_path: Path, where: str
    ) -> None:
        command = f"$P --base-dir {archives} --target-dir {tmp_path}/t --executor serial --progress none"
        assert shell(f"{command} --json {where}")[0] == ExitCode.STOPPED
        assert shell(f"{command} {where}")[0] == ExitCode.OK  # nothing was to be written there

    def test_an_error_keeps_its_code(self, tmp_path: Path, where: str) -> None:
        code, _, err = shell(f"$P --base-dir {tmp_path} --json --progress none {where}")
        assert code == ExitCode.CANNOT_START
        assert "no ImageNet archives" in err.splitlines()[0]


def test_a_reader_that_has_gone(archives: Path) -> None:
    code, _, err = shell(f"$P plan --base-dir {archives} --progress none | true; exit ${{PIPESTATUS[0]}}")
    assert code in (ExitCode.OK, ExitCode.STOPPED)  # `true` may end before or after the plan is written
    assert "Traceback" not in err
    assert "Exception" not in err


@pytest.mark.parametrize("where", ["2> /dev/full", "2>&-", "2>&- >&-"])
def test_a_standard_error_that_cannot_be_written_changes_nothing(archives: Path, tmp_path: Path, where: str) -> None:
    assert shell(f"$P --base-dir {archives} --target-dir {tmp_path}/t --executor serial {where}")[0] == ExitCode.OK
    assert shell(f"$P --base-dir {tmp_path}/nothing {where}")[0] == ExitCode.CANNOT_START
    assert shell(f"$P --no-such-option {where}")[0] == ExitCode.USAGE


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_paths_of_any_bytes_in_any_encoding(archives: Path, tmp_path: Path, encoding: str) -> None:
    target = tmp_path / "-größe 数据" / os.fsdecode(b"latin-\xe9")
    options = '--base-dir "$B" --target-dir "$T" --executor serial'
    env = os.environ | {"PYTHONIOENCODING": encoding, "B": str(archives), "T": str(target)}
    out = b""
    for command in (f"plan {options}", f"sbatch {options}", f"{options} --progress bar --json", 'check "$T"'):
        line = f"{sys.executable} -m imagenet_unpack {command}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, timeout=60, check=False, env=env)
        assert done.returncode == 0, (command, done.stderr)
        out = done.stdout if "json" in command else out
    assert os.fsencode(json.loads(out)["target"]) == os.fsencode(target)


def test_the_settings_of_tqdm_for_others_are_harmless(archives: Path, tmp_path: Path) -> None:
    command = f"$P --base-dir {archives} --target-dir {tmp_path}/t --executor serial --progress bar"
    code, _, err = shell(command, TQDM_MININTERVAL="abc", TQDM_NCOLS="x", TQDM_SMOOTHING="y")
    assert code == 0, err
    assert "extracting" in err


class TestJson:
    @pytest.mark.parametrize("command", ["", "plan", "tune"])
    def test_there_is_an_object_for_5(self, command: str, tmp_path: Path) -> None:
        code, out, _ = shell(f"$P {command} --base-dir {tmp_path} --json")
        assert code == ExitCode.CANNOT_START
        result = json.loads(out)
        assert (result["command"], result["status"], result["exit_code"]) == (command or "unpack", "failed", 5)

    def test_there_is_none_for_2(self, tmp_path: Path) -> None:
        code, out, _ = shell(f"$P --base-dir {tmp_path} --json --restart --part 0/2")
        assert (code, out) == (ExitCode.USAGE, "")

    @pytest.mark.parametrize("name", ["INT", "TERM", "USR1", "USR2"])
    def test_there_is_one_for_a_signal(self, archives: Path, tmp_path: Path, name: str) -> None:
        fifo = tmp_path / "labels"
        os.mkfifo(fifo)
        command = [sys.executable, "-m", "imagenet_unpack", "plan", "--base-dir", str(archives), "--json"]
        with (
            subprocess.Popen(
                [*command, "--val-labels", str(fifo)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ) as process,
            open(fifo, "wb"),  # opens once the program reads there, and then waits for an end that does not come
        ):
            process.send_signal(getattr(signal, f"SIG{name}"))
            out, err = process.communicate(timeout=30)
        code = ExitCode[f"SIG{name}"]
        result = json.loads(out)
        assert process.returncode == code
        assert (result["status"], result["exit_code"]) == ("interrupted", code)
        assert f"SIG{name}" in err.splitlines()[-1]
        assert "Traceback" not in err


def test_control_characters_in_names_neither_split_a_line_nor_reach_the_terminal(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a\x1b[31m\nb"
    (folder / "tars").mkdir(parents=True)
    (folder / "tars" / "n01440764.tar").write_bytes(b"")
    (folder / "tars" / "x\x1b[0m\ny").write_bytes(b"")
    assert cli.main(["--source", str(folder / "tars"), "--target-dir", str(tmp_path / "t")]) == 5
    assert len(capsys.readouterr().err.splitlines()) == 1
    (folder / "tars" / "n01440764.tar").write_bytes(tar([("n01440764_1.JPEG", b"x")]))
    command = ["--source", str(folder / "tars"), "--splits", "train", "--target-dir", str(folder / "t")]
    for way in ("log", "bar"):
        assert cli.main([*command, "--progress", way, "--executor", "serial"]) == 0
    assert cli.main(["plan", *command]) == 0
    shown = "".join(capsys.readouterr())
    assert "x\\x1b[0m\\ny" in shown
    assert "\x1b[0m" not in shown
    assert "\x1b[31m" not in shown
