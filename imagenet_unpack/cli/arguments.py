"""The command line: commands, how their options are put together, and errors that point to the right help page."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence

from imagenet_unpack import __version__
from imagenet_unpack.cli.commandarguments import (
    add_batch_options,
    add_check_options,
    add_lists_options,
    add_report_options,
    add_synth_options,
    add_tune_options,
)
from imagenet_unpack.cli.imagearguments import add_image_options, add_restore_options
from imagenet_unpack.cli.parser import WIDTH, Formatter, Parser
from imagenet_unpack.cli.runarguments import (
    add_limit_options,
    add_output_options,
    add_progress,
    add_run_options,
    add_source_options,
    add_workers,
)
from imagenet_unpack.errors import ExitCode

TYPE_CHECKING = False  # typing is slow to import and nothing here needs it at run time
if TYPE_CHECKING:
    from typing import NoReturn

COMMANDS = {
    "unpack": "plan, extract, check and publish; run again to continue an unfinished run",
    "plan": "show what unpack would do; read headers only, write nothing",
    "check": "check that a tree is whole: count and compare",
    "image": "make one mountable file of the archives instead of a tree of files",
    "restore": "turn an image made in place back into its archive",
    "lists": "write lists of images and class indices for other frameworks",
    "report": "make a page that shows what is in a tree: counts, the last run, images of each class",
    "synth": "write small archives and label files in the shape of ImageNet",
    "tune": "try numbers of workers on this archive and target and recommend one",
    "sbatch": "print a Slurm batch script for this command line",
    "demo": "try it all: write small archives into a temporary folder, unpack and check them",
}


def program_name() -> str:
    """Return what the user typed to run this program."""
    name = os.path.basename(sys.argv[0])
    return name if name == "imagenet-unpack" else "python -m imagenet_unpack"


def build_parsers() -> dict[str, Parser]:
    """Return the parser of each command; the one of the whole program has the name ""."""
    top = Parser(
        prog=program_name(),
        description="Unpack the ImageNet-1K archives into class folders.\nWithout a command: unpack.",
        epilog=_exit_codes(),
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"imagenet_unpack {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    parsers = {"": top}
    for name, summary in COMMANDS.items():
        parsers[name] = commands.add_parser(
            name,
            help=summary,
            description=textwrap.fill(summary[0].upper() + summary[1:] + ".", WIDTH - 2),
            formatter_class=Formatter,
            allow_abbrev=False,
        )
    for name in ("unpack", "plan"):  # one command line serves both
        add_source_options(parsers[name])
        add_run_options(parsers[name])
    parsers["unpack"].epilog = parsers["plan"].epilog = (
        "Training: most libraries number classes by their sorted folder names\n"
        "(torchvision, Keras, DALI, Hugging Face): use --layout wnid or padded to get the\n"
        "published class indices."
    )
    add_check_options(parsers["check"])
    add_source_options(parsers["image"], tree=False)
    add_image_options(parsers["image"])
    add_limit_options(parsers["image"])
    add_output_options(parsers["image"])
    add_restore_options(parsers["restore"])
    add_lists_options(parsers["lists"])
    add_report_options(parsers["report"])
    add_synth_options(parsers["synth"])
    add_tune_options(parsers["tune"])
    add_batch_options(parsers["sbatch"])
    parsers["sbatch"].epilog = "All options of unpack are taken too and become part of the script."
    add_workers(parsers["demo"])
    add_progress(parsers["demo"])
    for name in COMMANDS:  # argparse would list every option before it describes them
        parsers[name].shorten_usage()
    return parsers


def _exit_codes() -> str:
    lines = [f"  {code:>3}  {code.description}" for code in ExitCode]
    return "\n".join(["exit codes:", *lines])


def with_default_command(arguments: Sequence[str]) -> list[str]:
    """Put `unpack` before a command line that has no command."""
    top_level = arguments and (not arguments[0].startswith("-") or arguments[0] in ("-h", "--help", "--version"))
    return [*arguments] if top_level else ["unpack", *arguments]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; for `sbatch`, `unpack_arguments` is what the script hands on, `unpack` what that means."""
    parsers = build_parsers()
    first = arguments[0]
    if first not in COMMANDS and not first.startswith("-"):
        parsers[""].error(_unknown_command(first))
    if first == "sbatch" and not {"-h", "--help"} & set(arguments):
        return _parse_sbatch(arguments[1:], parsers)
    return _parse_all(parsers, first, arguments)


def _parse_all(parsers: dict[str, Parser], command: str, arguments: Sequence[str]) -> argparse.Namespace:
    args, unknown = parsers[""].parse_known_args(arguments)
    if unknown:
        _refuse(parsers, command, unknown)
    return args


def _parse_sbatch(arguments: Sequence[str], parsers: dict[str, Parser]) -> argparse.Namespace:
    own = Parser(prog=parsers["sbatch"].prog, add_help=False, allow_abbrev=False)
    add_batch_options(own)
    args, rest = own.parse_known_args(arguments)
    # What unpack would refuse is refused now, not in the queue.
    checked = _parse_all(parsers, "unpack", ["unpack", *rest])
    if hasattr(checked, "part"):
        own.error("the script sets --part itself: use --parts N")
    return argparse.Namespace(**vars(args), command="sbatch", unpack_arguments=rest, unpack=checked)


def _unknown_command(word: str) -> str:
    similar = _similar(word, list(COMMANDS))
    if similar:
        return f"unknown command {word!r}: did you mean {similar}?"
    if "/" in word or os.path.exists(word):
        return f"{word!r} is not a command: use --base-dir {word} to unpack the archives in that folder"
    return f"unknown command {word!r}: use {', '.join(COMMANDS)}"


def _refuse(parsers: dict[str, Parser], command: str, unknown: Sequence[str]) -> NoReturn:
    """End with an error for arguments that no option takes, with a suggestion where there is one."""
    parser = parsers[command]
    word = next((word for word in unknown if word.startswith("-")), None)
    if word is None:
        hint = (
            f": use --base-dir {unknown[0]} for the folder with the archives" if command in ("unpack", "plan") else ""
        )
        parser.error(f"unexpected argument {unknown[0]!r}{hint}")
    option = word.partition("=")[0]
    similar = _similar(option, parser.options())
    if similar:
        parser.error(f"unknown option {option}: did you mean {similar}?")
    owner = next((name for name, other in parsers.items() if name and option in other.options()), None)
    if owner is not None:
        parsers[owner].error(f"{option} is an option of {owner}, not of {command}")
    parser.error(f"unknown option {option}")


def _similar(word: str, known: Sequence[str]) -> str | None:
    import difflib  # noqa: PLC0415 - for errors only

    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.7)), None)
