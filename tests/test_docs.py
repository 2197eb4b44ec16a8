"""What docs, help and code promise each other: exit codes and commands."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import imagenet_unpack
from imagenet_unpack.cli import arguments
from imagenet_unpack.dataset.synth import SynthSpec, write_archives
from imagenet_unpack.errors import ExitCode

ROOT = Path(__file__).resolve().parent.parent


def documented_codes(markdown: str) -> list[int]:
    """Read the first column of the table whose header is `code` and `meaning`."""
    lines = iter(markdown.splitlines())
    for line in lines:
        if re.match(r"\|\s*code\s*\|\s*meaning\s*\|", line, re.IGNORECASE):
            break
    next(lines, None)  # the rule under the header
    codes: list[int] = []
    for line in lines:
        if not line.startswith("|"):
            break
        codes += map(int, re.findall(r"\d+", line.split("|")[1]))
    return codes


def helped_codes(text: str) -> list[int]:
    """Read the first numbers of each line of the section `exit codes` of the help, up to the next empty line."""
    _, found, section = text.partition(next(iter(re.findall(r"(?im)^.*exit codes.*$", text)), "\0"))
    if not found:
        return []
    codes: list[int] = []
    for line in section.lstrip("\n").splitlines():
        if not line.strip():
            break
        first = re.match(r"\s*(\d+(?:\s*[/,]\s*\d+)*)\s", line)
        codes += map(int, re.findall(r"\d+", first[1])) if first else []
    return codes


def test_the_readme_names_every_exit_code_once() -> None:
    assert documented_codes((ROOT / "README.md").read_text(encoding="utf-8")) == [*map(int, ExitCode)]


def test_the_help_names_every_exit_code_once() -> None:
    assert helped_codes(arguments.build_parsers()[""].format_help()) == [*map(int, ExitCode)]


def test_the_readme_lists_every_command_once() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.findall(r"(?m)^\| `(\w+)[^`]*`[^|]*\|", text)
    assert sorted(table) == sorted(arguments.COMMANDS)


def command_lines(page: Path) -> list[str]:
    """Return the command lines of this program in the blocks and in the text of a page."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"(?ms)^```\w*\n(.*?)^```$", text) + re.findall(r"(?m)^ {4}(\S.*)$", text))
    lines = blocks.replace("\\\n", " ").splitlines() + re.findall(r"`([^`\n]+)`", text)
    found = [re.search(r"(?:python -m imagenet_unpack|(?<![\w/])imagenet-unpack)( .*)?$", line) for line in lines]
    return [(match[1] or "").strip() for match in found if match]


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_command_lines_of_a_page_are_what_the_program_takes(page: Path) -> None:
    for line in command_lines(page):
        mine = re.split(r"\s(?:&&|\||>|;|&|\.\.\.)(?=\s|$)", line)[
            0
        ]  # what a shell takes for itself, or more of the same
        words = shlex.split(mine, comments=True)
        stands_for = {"COMMAND": "unpack", "KIND": "folder", "$SLURM_CPUS_ON_NODE": "8"}
        words = [stands_for.get(word, word) for word in words if word != "$@"]
        if not {"--help", "--version"} & set(words):
            arguments.parse(arguments.with_default_command(words))  # it ends with 2 where it does not take them


# Options of other programs that pages name.
FOREIGN = {
    "--bind",
    "--ntasks-per-node",
    "--cpus-per-task",
    "--nworkers",
    "--nthreads",
    "--scheduler-file",
    "--to-command",
    "--kills",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_options_that_a_page_names_exist(page: Path) -> None:
    known = {option for parser in arguments.build_parsers().values() for option in parser.options()}
    named = {option for span in re.findall(r"`(--[^`\n]+)`", page.read_text(encoding="utf-8"))
             for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)}  # fmt: skip
    assert named - known - FOREIGN == set()


def test_the_architecture_page_has_the_packages_in_the_order_that_is_enforced() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Packages")[2]
    told = [re.findall(r"`(\w+)`", cells) for cells in re.findall(r"(?m)^\| (`[^|]*) \|", text)]
    config = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("layers = [")[2].partition("]")[0]
    enforced = [re.findall(r"\w+", layer) for layer in re.findall(r'"([^"]*)"', config)]
    assert [set(names) for names in told] == [set(names) for names in enforced]


def test_versions_agree() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {imagenet_unpack.__version__}\n" in text


def test_exit_codes_of_signals_are_those_of_the_shell() -> None:
    # SIGUSR1 and SIGUSR2 have other numbers elsewhere; the published codes are those of Linux on x86 and ARM.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        assert ExitCode[number.name] == 128 + number


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_job_scripts_of_the_cluster_page_are_clean() -> None:
    scripts = [block for block in code_blocks(ROOT / "docs" / "clusters.md", "bash") if block.startswith("#!")]
    assert len(scripts) == 2
    for script in scripts:
        done = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")


def test_the_snippets_of_the_python_page_run_as_a_script(tmp_path: Path) -> None:
    """In a file and without a guard, as the page says."""
    write_archives(tmp_path / "archives", SynthSpec(classes=3, images_per_class=4, val_images=6, mean_bytes=2000))
    script = tmp_path / "script.py"
    snippets = code_blocks(ROOT / "docs" / "python.md", "python")
    assert len(snippets) >= 3
    script.write_text("\n".join(snippets), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[:2] == ["True 6", "12"]


def test_the_python_page_names_every_error() -> None:
    from imagenet_unpack import errors

    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"(?m)^\| (`[^|]*`) \| (\d+) \|$", text))
    told = {name: int(code) for names, code in rows.items() for name in re.findall(r"\w+Error", names)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.UnpackError)]
    assert told == {kind.__name__: kind.exit_code for kind in kinds if kind is not errors.UnpackError}
