"""What docs, help and code promise each other: exit codes and commands."""

from __future__ import annotations

import re
import signal
from pathlib import Path

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
