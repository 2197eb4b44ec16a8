"""What docs and code promise each other: the direction of imports, the edge, and the exit codes."""

from __future__ import annotations

import ast
import re
import signal
from pathlib import Path
from typing import NamedTuple

import pytest

from imagenet_unpack.errors import ExitCode

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "imagenet_unpack"

# From the edge down to the values; an import points to a module further down, never up. A new module needs its
# place here and in the table of docs/architecture.md.
ORDER = (
    "__main__",
    "cli",
    "options",
    "report",
    "tune",
    "runner",
    "live",
    "splitrun",
    "dask_executor",
    "executors",
    "progress",
    "batch",
    "worker",
    "extractor",
    "board",
    "throttle",
    "host",
    "quota",
    "checker",
    "pool",
    "staging",
    "journal",
    "manifest",
    "planner",
    "labels",
    "tarindex",
    "synth",
    "ilsvrc2012",
    "text",
    "model",
    "errors",
    "__init__",
)
RANK = {name: position for position, name in enumerate(ORDER)}
EDGE = {"__main__", "cli"}
# These only ever meet at the edge, or must not know each other for what they are worth.
APART = {
    ("checker", "extractor"): "a check that shares code with the writer shares its mistakes",
    ("checker", "tarindex"): "likewise",
    ("runner", "progress"): "the runner owns the protocol, the edge chooses what implements it",
    ("runner", "batch"): "what the batch system says is read at the edge",
}


class Import(NamedTuple):
    """One import statement that names a module of the package."""

    importer: str
    imported: str
    line: int


def modules() -> dict[str, ast.Module]:
    return {
        path.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(path.read_text(encoding="utf-8"), str(path))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports_of(name: str, tree: ast.Module) -> list[Import]:
    """Every import of the package's own modules, in functions and under TYPE_CHECKING too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}.py:{node.lineno}: relative import"
            source = node.module or ""
            names = [f"{source}.{alias.name}" for alias in node.names] if source == PACKAGE.name else [source]
        else:
            continue
        for full in names:
            head, _, rest = full.partition(".")
            if head == PACKAGE.name:
                module = rest.split(".")[0]
                found.append(Import(name, module if module in RANK else "__init__", node.lineno))
    return found


def pointing_wrong(imports: list[Import]) -> list[Import]:
    return [each for each in imports if RANK[each.importer] >= RANK[each.imported]]


def edge_uses(tree: ast.Module) -> list[tuple[int, str]]:
    """Where a module prints, or reads the environment or the command line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"print", "input"}:
            found.append((node.lineno, node.func.id))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            dotted = f"{node.value.id}.{node.attr}"
            if dotted in {"os.environ", "os.getenv", "os.environb", "sys.argv", "sys.stdout", "sys.stderr", "sys.exit"}:
                found.append((node.lineno, dotted))
        elif isinstance(node, ast.ImportFrom) and node.module in {"os", "sys"}:
            found += [
                (node.lineno, f"{node.module}.{alias.name}")
                for alias in node.names
                if alias.name in {"environ", "environb", "getenv", "argv", "stdout", "stderr", "exit"}
            ]
    return found


def test_every_module_has_its_place() -> None:
    assert {name for name in modules() if not name.startswith("data/")} <= set(ORDER)


def test_imports_point_down() -> None:
    wrong = [each for name, tree in modules().items() for each in pointing_wrong(imports_of(name, tree))]
    assert not wrong


def test_what_must_not_know_each_other_does_not() -> None:
    seen = {(each.importer, each.imported) for name, tree in modules().items() for each in imports_of(name, tree)}
    assert not {pair: reason for pair, reason in APART.items() if pair in seen}


def test_the_checker_reaches_no_extractor_through_others_either() -> None:
    trees = modules()
    reached: set[str] = set()
    waiting = ["checker"]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += [each.imported for each in imports_of(name, trees[name])]
    assert "extractor" not in reached


@pytest.mark.parametrize("name", sorted(set(modules()) - EDGE))
def test_only_the_edge_talks_to_people_and_to_the_environment(name: str) -> None:
    assert not edge_uses(modules()[name])


class TestTheTestsThemselves:
    """A rule that nothing can break holds nothing."""

    @pytest.mark.parametrize(
        "source",
        [
            "from imagenet_unpack import runner",
            "from imagenet_unpack.runner import run",
            "import imagenet_unpack.runner",
            "def f():\n    from imagenet_unpack.runner import run",
            "if TYPE_CHECKING:\n    from imagenet_unpack.runner import Reporter",
        ],
    )
    def test_an_import_that_points_up_is_seen(self, source: str) -> None:
        assert pointing_wrong(imports_of("model", ast.parse(source)))

    def test_an_import_that_points_down_is_fine(self) -> None:
        tree = ast.parse(
            "import os\nfrom imagenet_unpack import __version__, model\nfrom imagenet_unpack.errors import X"
        )
        assert len(imports_of("runner", tree)) == 3
        assert not pointing_wrong(imports_of("runner", tree))

    @pytest.mark.parametrize(
        "source",
        ["print(1)", "os.environ['A']", "os.getenv('A')", "sys.argv", "from os import environ", "x = sys.stderr"],
    )
    def test_talking_is_seen(self, source: str) -> None:
        assert edge_uses(ast.parse(source))


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
    from imagenet_unpack import options

    assert helped_codes(options.build_parser().format_help()) == [*map(int, ExitCode)]


def test_the_readme_names_every_command() -> None:
    from imagenet_unpack import options

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    parser = options.build_parser()
    commands = [name for action in parser._actions if isinstance(action.choices, dict) for name in action.choices]
    assert {"unpack", "plan", "check", "synth", "demo"} <= set(commands)
    assert not [name for name in commands if not re.search(rf"`[^`\n]*\b{name}\b[^`\n]*`", readme)]


def test_exit_codes_of_signals_are_those_of_the_shell() -> None:
    # SIGUSR1 and SIGUSR2 have other numbers elsewhere; the published codes are those of Linux on x86 and ARM.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        assert ExitCode[number.name] == 128 + number
