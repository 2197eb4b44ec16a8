"""The command line: commands, their options in groups, and errors that point to the right help page.

Options of `unpack` have no default here: what is not given is left to `options.UnpackOptions`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import textwrap
from collections.abc import Sequence

from imagenet_unpack import __version__
from imagenet_unpack.cli import streams, values
from imagenet_unpack.cli.imagearguments import add_image_options, add_restore_options
from imagenet_unpack.errors import ExitCode

TYPE_CHECKING = False  # typing is slow to import and nothing here needs it at run time
if TYPE_CHECKING:
    from typing import Any, NoReturn

_SYNTH_KINDS = (  # as in dataset/kinds.py, which is slow to import
    "official",
    "official-targz",
    "folder",
    "winter21",
    "kaggle-zip",
    "kaggle-zip-targz",
    "kaggle-targz",
    "hf-targz",
    "hf-parquet",
)
_LIST_FORMATS = ("caffe", "dali", "paddle", "torchvision", "xxhsum")  # as in lists.py, likewise
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
_WIDTH = 80


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Formats help within 80 columns, or the terminal's where that is narrower."""

    def __init__(self, prog: str) -> None:
        try:
            columns = int(os.environ.get("COLUMNS", "")) or os.get_terminal_size().columns
        except (ValueError, OSError):
            columns = _WIDTH
        super().__init__(prog, max_help_position=28, width=max(min(columns, _WIDTH), 40) - 2)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line that names the help page."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and where the options are described, and exit with 2."""
        text = message.removeprefix("argument ")
        streams.say(f"imagenet_unpack: {text}. See `{self.prog} --help`")
        sys.exit(ExitCode.USAGE)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help and version if they can be printed; until Python 3.11 argparse fails on a closed stream."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            super()._print_message(message, file)

    def shorten_usage(self) -> None:
        """Let the usage name the positional arguments alone."""
        positional = [str(action.metavar) for action in self._actions if not action.option_strings]
        self.usage = " ".join(["%(prog)s [OPTIONS]", *positional])

    def options(self) -> list[str]:
        """Return the long options that the help shows."""
        shown = [action for action in self._actions if action.help is not argparse.SUPPRESS]
        return [option for action in shown for option in action.option_strings if option.startswith("--")]


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
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"imagenet_unpack {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    parsers = {"": top}
    for name, summary in COMMANDS.items():
        parsers[name] = commands.add_parser(
            name,
            help=summary,
            description=textwrap.fill(summary[0].upper() + summary[1:] + ".", _WIDTH - 2),
            formatter_class=_Formatter,
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
    _add_check_options(parsers["check"])
    add_source_options(parsers["image"], tree=False)
    add_image_options(parsers["image"])
    add_limit_options(parsers["image"])
    _add_output_options(parsers["image"])
    add_restore_options(parsers["restore"])
    _add_lists_options(parsers["lists"])
    _add_report_options(parsers["report"])
    _add_synth_options(parsers["synth"])
    _add_tune_options(parsers["tune"])
    _add_batch_options(parsers["sbatch"])
    parsers["sbatch"].epilog = "All options of unpack are taken too and become part of the script."
    _add_workers(parsers["demo"])
    _add_progress(parsers["demo"])
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
    """Parse a command line; for `sbatch`, `unpack_arguments` is what the script hands to `unpack`."""
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
    _add_batch_options(own)
    args, rest = own.parse_known_args(arguments)
    # What unpack would refuse is refused now, not in the queue.
    checked = _parse_all(parsers, "unpack", ["unpack", *rest])
    if hasattr(checked, "part"):
        own.error("the script sets --part itself: use --parts N")
    return argparse.Namespace(**vars(args), command="sbatch", unpack_arguments=rest)


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


def add_source_options(parser: argparse.ArgumentParser, *, tree: bool = True) -> None:
    """Add what says which images to take and, for a tree, where that goes."""
    group = parser.add_argument_group("what to unpack")

    def add(option: str, text: str, **settings: object) -> None:
        group.add_argument(option, help=text, default=argparse.SUPPRESS, **settings)  # type: ignore[arg-type]

    add("--base-dir", "look for archives and label files in DIR (default: .)", type=values.path, metavar="DIR")
    if tree:
        add("--target-dir", "create the tree in DIR (default: BASE/ImageNet)", type=values.path, metavar="DIR")
    text = "read the train archive from FILE (default: BASE/ILSVRC2012_img_train.tar)"
    add("--train-archive", text, type=values.path, metavar="FILE")
    text = "read the validation archive from FILE (default: BASE/ILSVRC2012_img_val.tar)"
    add("--val-archive", text, type=values.path, metavar="FILE")
    text = "read the test archive from FILE (default: BASE/ILSVRC2012_img_test_v10102019.tar)"
    add("--test-archive", text, type=values.path, metavar="FILE")
    text = "recognise this archive or folder and take its splits, instead of what BASE holds; may be repeated"
    add("--source", f"{text} (default: BASE)", type=values.path, metavar="PATH", action="append")
    text = "read the classes from FILE (default: BASE/ImageNet_class_index.json if it exists, else built in)"
    add("--class-index", text, type=values.path, metavar="FILE")
    text = "read the validation labels from FILE (default: BASE/ImageNet_val_label.txt if it exists, else built in)"
    add("--val-labels", text, type=values.path, metavar="FILE")
    text = "unpack these splits only: train, val, test or a list (default: train,val, whichever archives exist)"
    add("--splits", text, type=values.splits, metavar="LIST")
    text = "unpack these classes only: 0-99,n01440764,517 or @FILE with one per line (default: all)"
    add("--classes", text, metavar="SPEC")
    text = "take inner archives of any wnids, as in ImageNet-21K; needs --splits train --layout wnid (default: off)"
    add("--any-wnids", text, action="store_true")
    text = "name class folders 0, 0000 or n01440764 (default: index); see below for training"
    if tree:
        add("--layout", text, choices=("index", "padded", "wnid"))
    text = (
        "compare the archives with the published sizes or SHA-256 digests before extracting (default: size; digest "
        "reads every byte first)"
    )
    add("--verify-archives", text, choices=("none", "size", "digest"))


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add how a run is carried out: workers, parts, limits, what is kept, and its output."""
    group = parser.add_argument_group("workers")

    def add(option: str, text: str, **settings: object) -> None:
        group.add_argument(option, help=text, default=argparse.SUPPRESS, **settings)  # type: ignore[arg-type]

    text = "run N worker processes (default: auto, the CPUs this job may use)"
    add("--workers", text, type=values.workers, metavar="N|auto")
    text = "run on local processes, in this process alone, or on a Dask cluster (default: local)"
    add("--executor", text, choices=("local", "serial", "dask"))
    add(
        "--dask-scheduler",
        "connect to the Dask scheduler at ADDRESS, such as tcp://node1:8786 (default: none)",
        metavar="ADDRESS",
    )
    text = "connect to the Dask scheduler that wrote FILE (`dask scheduler --scheduler-file FILE`) (default: none)"
    add("--dask-scheduler-file", text, type=values.path, metavar="FILE")
    text = (
        "do part I (from 0) of N of the plan and publish nothing; auto: take both from the batch system's variables; "
        "run 0/1 at last to check and publish (default: 0/1)"
    )
    add("--part", text, type=values.part, metavar="I/N|auto")
    add("--shard", argparse.SUPPRESS, type=values.part, dest="part")  # its name until 0.1.0

    add_limit_options(parser)
    group = parser.add_argument_group("files and unfinished runs")
    add("--keep-mtime", "set the modification times that the archive records (default: off)", action="store_true")
    text = "keep written files out of the page cache; needs Linux 6.14 (default: off)"
    add("--uncached-writes", text, action="store_true")
    text = "continue although the archive's modification time differs (default: off)"
    add("--same-archive", text, action="store_true")
    text = "free each class in the archive once it is on the disk; destroys the archive (default: off)"
    add("--consume", text, action="store_true")
    add("--yes", "confirm --consume without a question (default: off)", action="store_true")
    text = "extract again what is missing or damaged in a published tree (default: off)"
    add("--repair", text, action="store_true")
    text = "wait for another run on the same target, then go on (default: off)"
    add("--wait", text, action="store_true")
    text = (
        "extract train, val or test before the others and publish it while they go on "
        "(default: none; val with --durability none)"
    )
    add("--first", text, choices=("train", "val", "test"), metavar="SPLIT")
    text = "disk: publish what is on the disk; none: do not wait for it, for node-local scratch (default: disk)"
    add("--durability", text, choices=("disk", "none"))
    text = "how files reach the disk: one by one, or the file system as a whole (default: auto, by its type)"
    add("--sync", text, choices=("auto", "files", "fs"))
    add("--restart", "discard the unfinished run and begin again (default: off)", action="store_true")
    add("--force", "start even if the free space seems too small (default: off)", action="store_true")
    _add_output_options(parser)


def add_limit_options(parser: argparse.ArgumentParser) -> None:
    """Add rates, thresholds and how long to wait for them."""
    group = parser.add_argument_group("limits")

    def add(option: str, text: str, **settings: object) -> None:
        group.add_argument(option, help=text, default=argparse.SUPPRESS, **settings)  # type: ignore[arg-type]

    for kind, verb in (("read", "reads"), ("write", "writes")):
        text = f"limit {verb} to BYTES per second, such as 50MB, shared by all your runs on this host (default: none)"
        add(f"--max-{kind}-rate", text, type=values.rate, metavar="BYTES")
    text = "limit file creation to FILES per second, shared likewise (default: none)"
    add("--max-create-rate", text, type=values.rate, metavar="FILES")
    text = "share the rates with runs on this host that name the same local DIR (default: with all your runs here)"
    add("--rate-dir", text, type=values.path, metavar="DIR")
    text = "pause while less is free on the target: 512M, 2GiB, 5%%; 0: off (default: 1GiB, less on small file systems)"
    add("--min-free-space", text, type=values.amount, metavar="BYTES")
    text = "pause while less memory is available to this job; 0: off (default: 512MiB, less in small jobs)"
    add("--min-free-memory", text, type=values.amount, metavar="BYTES")
    text = "give up (exit code 6) after waiting this long for space, memory or workers (default: 600)"
    add("--stall-timeout", text, type=values.seconds, metavar="SECONDS")


def _add_check_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", type=values.path, metavar="TARGET", help="folder that holds train/ and val/, or an image"
    )
    parser.add_argument("--deep", action="store_true", help="read every byte and compare digests (default: off)")
    text = "read the first and last bytes of every image: list empty, truncated and misnamed ones (default: off)"
    parser.add_argument("--contents", action="store_true", help=text)
    _add_workers(parser)
    _add_output_options(parser)


def _add_lists_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("target", type=values.path, metavar="TARGET", help="folder that unpack wrote, or a mounted image")
    text = (
        "caffe (also MMPretrain), dali, paddle: path and class index; torchvision: the meta.bin of its ImageNet class "
        "(extra [torch]); xxhsum: digests for `xxhsum -c` (default: %(default)s)"
    )
    add("--format", choices=_LIST_FORMATS, default="caffe", help=text)
    add("--output", type=values.path, metavar="DIR", help="write to the folder DIR (default: TARGET)")


def _add_report_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("target", type=values.path, metavar="TARGET", help="folder that holds train/ and val/, or a mounted image")
    text = "write the page to FILE (default: %(default)s); an earlier report is replaced"
    add("--output", type=values.path, default="imagenet-report.html", metavar="FILE.html", help=text)
    text = "show N images of each class and split (default: 2 to 24, depending on the number of classes)"
    add("--images", type=values.positive, metavar="N", help=text)
    _add_workers(parser)
    _add_output_options(parser)


def _add_synth_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=values.path, metavar="DIR", help="folder to write to; it may exist")
    add("--classes", type=values.positive, default=10, metavar="N", help="write N classes (default: %(default)s)")
    text = "write N train images per class (default: %(default)s)"
    add("--images", type=values.positive, default=20, metavar="N", help=text)
    text = "write as many train images per class as the real data set has (default: off)"
    add("--real-counts", action="store_true", help=text)
    text = "write N validation images; 0: no validation archive (default: %(default)s)"
    add("--val-images", type=values.count, default=50, metavar="N", help=text)
    text = "write N test images; 0: no test archive (default: %(default)s)"
    add("--test-images", type=values.count, default=0, metavar="N", help=text)
    text = (
        f"write this kind of archive ({', '.join(_SYNTH_KINDS)}); all kinds of one seed hold the same images "
        "(default: %(default)s)"
    )
    add("--kind", choices=_SYNTH_KINDS, default="official", metavar="KIND", help=text)
    text = "make images of N bytes on average (default: %(default)s)"
    add("--mean-bytes", type=values.positive, default=114_000, metavar="N", help=text)
    text = "seed the contents; the same seed gives the same bytes (default: %(default)s)"
    add("--seed", type=values.count, default=0, metavar="N", help=text)
    text = "write this tar format (default: %(default)s)"
    add("--format", choices=("gnu", "ustar", "pax"), default="gnu", help=text)
    text = "fill images with random bytes, or leave holes (default: %(default)s)"
    add("--bodies", choices=("random", "holes"), default="random", help=text)
    add("--no-labels", action="store_true", help="write no label files (default: off)")


def _add_tune_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base-dir", type=values.path, default=".", metavar="DIR", help="look for the archive in DIR (default: .)")
    text = "read the train archive from FILE (default: BASE/ILSVRC2012_img_train.tar)"
    add("--train-archive", type=values.path, metavar="FILE", help=text)
    text = "write the trials to this existing folder and remove them again (default: BASE)"
    add("--target-dir", type=values.path, metavar="DIR", help=text)
    text = "try these numbers, such as 1,4,16 (default: 1, 2, 4, ... up to four times the CPUs)"
    add("--workers", type=values.numbers, default=(), metavar="A,B,...", help=text)
    text = "extract this much in all trials together: 5G, or 5%% of the archive (default: %(default)s)"
    add("--sample", type=values.amount, default="5G", metavar="BYTES", help=text)
    text = "stop after about this time (default: %(default)s)"
    add("--budget", type=values.seconds, default="120", metavar="SECONDS", help=text)
    add("--json", action="store_true", help="print one JSON object to stdout at the end (default: off)")


def _add_batch_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "submit N parts as an array, then a job that checks and publishes; 1: one job (default: %(default)s)"
    add("--parts", type=values.positive, default=1, metavar="N", help=text)
    text = "request N CPUs for each job and run as many workers (default: 8)"
    add("--workers", type=values.workers, metavar="N", help=text)
    add("--memory", default="8G", metavar="SIZE", help="request this memory for each job (default: %(default)s)")
    text = "set the time limit of each job, as Slurm writes it (default: %(default)s)"
    add("--time", default="04:00:00", metavar="LIMIT", help=text)
    add("--account", default="", metavar="NAME", help="charge this account (default: the cluster's default)")
    add("--partition", default="", metavar="NAME", help="use this partition (default: the cluster's default)")
    text = "name the jobs and their logs (default: %(default)s)"
    add("--job-name", default="imagenet", metavar="NAME", help=text)
    text = (
        "ask the program to stop this long before the time limit; the job is requeued and continues "
        "(default: %(default)s)"
    )
    add("--signal-before", type=values.positive, default=120, metavar="SECONDS", help=text)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    text = "run N worker processes (default: auto, the CPUs this job may use)"
    parser.add_argument("--workers", type=values.workers, metavar="N|auto", help=text)


def _add_progress(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    text = "show progress on stderr: auto is a bar on a terminal, else a line now and then (default: auto)"
    parser.add_argument("--progress", choices=("auto", "bar", "log", "json", "none"), default="auto", help=text)


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    _add_progress(group)
    group.add_argument(
        "--json", action="store_true", help="print one JSON object to stdout at the end, nothing else (default: off)"
    )
