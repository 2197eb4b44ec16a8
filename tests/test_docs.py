"""What docs, help and code promise each other: exit codes and commands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

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
    from imagenet_unpack.cli import arguments

    assert helped_codes(arguments.build_parsers()[""].format_help()) == [*map(int, ExitCode)]


def test_the_readme_names_every_command() -> None:
    from imagenet_unpack.cli import arguments

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"unpack", "plan", "check", "synth", "demo"} <= set(arguments.COMMANDS)
    assert not [name for name in arguments.COMMANDS if not re.search(rf"`[^`\n]*\b{name}\b[^`\n]*`", readme)]


def test_exit_codes_of_signals_are_those_of_the_shell() -> None:
    # SIGUSR1 and SIGUSR2 have other numbers elsewhere; the published codes are those of Linux on x86 and ARM.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        assert ExitCode[number.name] == 128 + number


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"))


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
