from __future__ import annotations

import inspect
import os
import resource
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

import imagenet_unpack
from imagenet_unpack.cli import arguments
from imagenet_unpack.cli.commands.unpack import read_options
from imagenet_unpack.cli.progress import PROGRESS_KINDS
from imagenet_unpack.errors import ExitCode
from imagenet_unpack.model import LAYOUTS, Part, VerifyLevel
from imagenet_unpack.options import ExecutorName, UnpackOptions

COMMANDS = ["", *arguments.COMMANDS]
OUTPUT_OPTIONS = {"progress", "json", "help"}


def refused(*words: str) -> str:
    """Return the one line with which a command line is refused."""
    done = subprocess.run(
        [sys.executable, "-m", "imagenet_unpack", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == ExitCode.USAGE
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_fits_in_80_columns(self, command: str) -> None:
        text = arguments.build_parsers()[command].format_help()
        assert max(map(len, text.splitlines())) <= 80

    @pytest.mark.parametrize("command", COMMANDS)
    def test_exit_codes_stand_on_the_top_level_alone(self, command: str) -> None:
        text = arguments.build_parsers()[command].format_help()
        for code in ExitCode:
            assert (code.description in text) is (command == "")

    @pytest.mark.parametrize("command", COMMANDS[1:])
    def test_every_option_states_its_default(self, command: str) -> None:
        for action in arguments.build_parsers()[command]._actions:
            if action.option_strings and action.help != "==SUPPRESS==" and "--help" not in action.option_strings:
                assert "(default: " in (action.help or ""), action.option_strings

    def test_says_which_layout_training_needs(self) -> None:
        text = arguments.build_parsers()["unpack"].format_help()
        assert "--layout wnid" in text.partition("Training")[2]

    def test_the_old_name_of_part_works_and_is_not_shown(self) -> None:
        assert read_options(arguments.parse(["unpack", "--shard", "1/4"])).part == Part(index=1, count=4)
        assert read_options(arguments.parse(["unpack", "--part", "1/4"])).part == Part(index=1, count=4)
        assert "--shard" not in arguments.build_parsers()["unpack"].format_help()

    def test_is_fast(self, tmp_path: Path) -> None:
        """It takes at most three times the CPU time of a Python that does nothing (best of several, from bytecode)."""
        environ = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        environ["PYTHONPYCACHEPREFIX"] = str(tmp_path)

        best_s = {"help": float("inf"), "nothing": float("inf")}
        for _ in range(40):  # as many as a busy machine needs
            for name, command in (("nothing", ["-c", "pass"]), ("help", ["-m", "imagenet_unpack", "--help"])):
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                subprocess.run([sys.executable, *command], capture_output=True, check=True, env=environ)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                taken_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
                best_s[name] = min(best_s[name], taken_s)
            if best_s["help"] < 3 * best_s["nothing"]:
                break
        assert best_s["help"] < 3 * best_s["nothing"]

    def test_loads_nothing_that_it_does_not_need(self) -> None:
        code = (
            "import sys\nbefore = set(sys.modules)  # an editable install loads some as Python starts\n"
            "from imagenet_unpack.cli.main import main\n"
            "try: main(['unpack', '--help'])\nexcept SystemExit: pass\n"
            "print(sorted({'joblib', 'psutil', 'tqdm', 'xxhash', 'dataclasses', 'pathlib', 'imagenet_unpack.dataset'}"
            " & (set(sys.modules) - before)), file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stderr.strip() == "[]"


class TestOptionsAreTheSameEverywhere:
    """The command line, `UnpackOptions` and the Python functions have the same options with the same defaults."""

    @pytest.mark.parametrize("command", ["unpack", "plan"])
    def test_command_line(self, command: str) -> None:
        shown = {action.dest for action in arguments.build_parsers()[command]._actions}
        assert shown - OUTPUT_OPTIONS == {field.name for field in fields(UnpackOptions)}

    def test_defaults_of_the_command_line(self) -> None:
        assert read_options(arguments.parse(["unpack"])) == UnpackOptions()

    def test_unpack(self) -> None:
        parameters = dict(inspect.signature(imagenet_unpack.unpack).parameters)
        assert parameters.pop("progress").default is None
        defaults = {field.name: field.default for field in fields(UnpackOptions)}
        assert parameters.keys() == defaults.keys()
        for name, parameter in parameters.items():
            if name not in {"base_dir", "part"}:  # plain types there
                assert parameter.default == defaults[name], name

    def test_plan(self) -> None:
        whole = inspect.signature(imagenet_unpack.unpack).parameters
        for name, parameter in inspect.signature(imagenet_unpack.plan).parameters.items():
            assert parameter == whole[name]

    def test_choices(self) -> None:
        choices = {action.dest: action.choices for action in arguments.build_parsers()["unpack"]._actions}
        assert choices["layout"] == LAYOUTS
        assert choices["executor"] == get_args(ExecutorName)
        assert choices["verify_archives"] == get_args(VerifyLevel)
        assert choices["progress"] == PROGRESS_KINDS


class TestErrors:
    @pytest.mark.parametrize(
        ("words", "parts"),
        [
            (["--worker", "4"], ["did you mean --workers?", "unpack --help"]),
            (["plan", "--targetdir=/x"], ["did you mean --target-dir?", "plan --help"]),
            (["--deep"], ["--deep is an option of check", "check --help"]),
            (["check", "x", "--layout", "wnid"], ["--layout is an option of unpack", "unpack --help"]),
            (["check", "x", "--workers", "0"], ["--workers", "at least 1", "check --help"]),
            (["--layout", "names"], ["--layout", "wnid", "unpack --help"]),
            (["unpak"], ["did you mean unpack?"]),
            (["/data/imagenet"], ["--base-dir /data/imagenet"]),
            (["unpack", "/data/imagenet"], ["--base-dir /data/imagenet", "unpack --help"]),
            (["check", "a", "b"], ["'b'", "check --help"]),
            (["check"], ["TARGET", "check --help"]),
            (["--target-dir", ""], ["--target-dir", "empty", "unpack --help"]),
            (["--base-dir", ""], ["--base-dir", "empty"]),
            (["check", ""], ["TARGET", "empty", "check --help"]),
            (["--min-free-space", "5x"], ["invalid size '5x': use 512M, 2GiB or 5%"]),
            (["--max-read-rate", "fast"], ["invalid rate 'fast'"]),
            (["--stall-timeout", "soon"], ["invalid time 'soon'"]),
            (["--part", "4/4"], ["invalid part '4/4'"]),
            (["--splits", "test,dev"], ["'"]),
            (["tune", "--workers", "1-4"], ["give numbers separated by commas, such as 1,4,16"]),
            (["sbatch", "--part", "1/2"], ["--parts N"]),
            (["sbatch", "--tine", "1"], ["unknown option --tine"]),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else None,
    )
    def test_say_what_to_do(self, words: list[str], parts: list[str]) -> None:
        line = refused(*words)
        for part in parts:
            assert part in line

    def test_name_the_program_as_it_was_called(self) -> None:
        assert "`python -m imagenet_unpack unpack --help`" in refused("--worker", "4")
