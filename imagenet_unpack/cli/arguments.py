"""The command line's commands and options, and what their values mean."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from imagenet_unpack import __version__
from imagenet_unpack.cli.progress import PROGRESS_KINDS
from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.errors import ExitCode
from imagenet_unpack.extract.throttle import DEFAULT_STALL_S
from imagenet_unpack.model import LAYOUTS, SPLITS, Part, SplitName

_EXIT_CODES = """exit codes:
  0  done: every split asked for is published and checked
  1  a defect of the program, with a traceback
  2  usage: bad option or value
  3  some shards failed; nothing of those splits is published; the same command tries them again
  4  the check found differences
  5  it could not start: archive, labels or target missing, damaged, in use or without room
  6  it had to stop part way: disk full, quota, I/O error, stall timeout; the same command continues
  130 / 143 / 138 / 140  stopped by SIGINT / SIGTERM / SIGUSR1 / SIGUSR2; the same command continues
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where the options stand, and end with 2."""
        self.exit(ExitCode.USAGE, f"imagenet_unpack: {message}: see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(
        prog="python -m imagenet_unpack",
        description="Unpack the ImageNet-1K archives into class folders. With no command: unpack.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"imagenet_unpack {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=_EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    unpack = add("unpack", "plan, extract, check, publish; again: continue an unfinished run")
    _add_source_options(unpack)
    _add_run_options(unpack)
    plan = add("plan", "show the plan; reads headers, writes nothing")
    _add_source_options(plan)
    _add_run_options(plan)  # so that one command line serves both
    check = add("check", "is this tree whole: count and compare")
    check.add_argument("target", type=Path, metavar="TARGET", help="folder that holds train/ and val/")
    check.add_argument("--deep", action="store_true", help="read every byte: compare sizes and digests")
    _add_workers(check)
    _add_output_options(check)
    make = add("synth", "write small ImageNet-shaped archives and label files")
    make.add_argument("folder", type=Path, metavar="DIR", help="where they go")
    make.add_argument("--classes", type=_positive, default=10, metavar="N", help="number of classes (%(default)s)")
    make.add_argument("--images", type=_positive, metavar="N", default=20, help="train images a class (%(default)s)")
    make.add_argument(
        "--real-counts", action="store_true", help="as many train images a class as the real data set has"
    )
    make.add_argument("--val-images", type=_count, default=50, metavar="N", help="0: no val archive (%(default)s)")
    make.add_argument("--mean-bytes", type=_positive, default=114_000, metavar="N", help="mean size (%(default)s)")
    make.add_argument("--seed", type=_count, default=0, metavar="N", help="same seed, same bytes (%(default)s)")
    make.add_argument("--format", choices=("gnu", "ustar", "pax"), default="gnu", help="tar format (%(default)s)")
    make.add_argument("--bodies", choices=("random", "holes"), default="random", help="image bodies (%(default)s)")
    make.add_argument("--no-labels", action="store_true", help="write no label files")
    batch = add("sbatch", "print a Slurm batch script for this very command line, all options of unpack included")
    _add_batch_options(batch)
    tune = add("tune", "try numbers of workers on this archive and target, recommend one, leave nothing behind")
    tune.add_argument("--base-dir", type=Path, default=Path(), metavar="DIR", help="folder with the train archive (.)")
    tune.add_argument("--train-archive", type=Path, metavar="F", help=f"(BASE/{ilsvrc2012.TRAIN_ARCHIVE_NAME})")
    tune.add_argument("--target-dir", type=Path, metavar="DIR", help="folder on the storage to be tried (BASE)")
    text = "numbers to try, such as 1,4,16,32 (1, 2, 4, ... to four times the CPUs)"
    tune.add_argument("--workers", type=_numbers, default=(), metavar="A,B,...", help=text)
    text = "extract so much in all trials together (%(default)s)"
    tune.add_argument("--sample", type=_amount, default="5G", metavar="BYTES", help=text)
    tune.add_argument("--budget", type=seconds, default="120", metavar="SECONDS", help="about (%(default)s)")
    tune.add_argument("--json", action="store_true", help="one JSON object on stdout at the end")
    demo = add("demo", "synth into a temporary folder, unpack and check it")
    _add_workers(demo)
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; for `sbatch`, `unpack_arguments` is what the script hands to `unpack`."""
    parser = build_parser()
    if arguments[0] != "sbatch" or {"-h", "--help"} & set(arguments):
        return parser.parse_args(arguments)
    own = _Parser(prog=f"{parser.prog} sbatch", add_help=False, allow_abbrev=False)
    _add_batch_options(own)
    args, rest = own.parse_known_args(arguments[1:])
    checked = parser.parse_args(["unpack", *rest])  # what unpack would refuse is refused now, not in the queue
    if checked.shard != Part():
        own.error("the script gives --shard by itself: use --parts N")
    return argparse.Namespace(**vars(args), command="sbatch", unpack_arguments=rest)


def _add_batch_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "parts as an array, then a job that checks and publishes (1: one job)"
    add("--parts", type=_positive, default=1, metavar="N", help=text)
    add("--workers", type=_workers, metavar="N", help="CPUs of each job, and its worker processes (8)")
    add("--memory", default="8G", metavar="SIZE", help="memory of each job (%(default)s)")
    add("--time", default="04:00:00", metavar="LIMIT", help="time limit of each job, as Slurm writes it (%(default)s)")
    add("--account", default="", metavar="NAME", help="account (the cluster's default)")
    add("--partition", default="", metavar="NAME", help="partition (the cluster's default)")
    add("--job-name", default="imagenet", metavar="NAME", help="name of the jobs and their logs (%(default)s)")
    text = "tell the program so long before the time limit; it ends in good order and the job is requeued (%(default)s)"
    add("--signal-before", type=_positive, default=120, metavar="SECONDS", help=text)


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base-dir", type=Path, default=Path(), metavar="DIR", help="folder with the archives (current folder)")
    add("--target-dir", type=Path, metavar="DIR", help="where the tree goes (BASE/ImageNet)")
    add("--train-archive", type=Path, metavar="F", help=f"(BASE/{ilsvrc2012.TRAIN_ARCHIVE_NAME})")
    add("--val-archive", type=Path, metavar="F", help=f"(BASE/{ilsvrc2012.VAL_ARCHIVE_NAME})")
    add("--class-index", type=Path, metavar="F", help="(BASE/ImageNet_class_index.json if there, else built in)")
    add("--val-labels", type=Path, metavar="F", help="(BASE/ImageNet_val_label.txt if there, else built in)")
    add("--splits", type=_splits, metavar="train,val", help="which splits (every one whose archive is there)")
    add("--classes", metavar="SPEC", help="0-99,n01440764,517 or @file with one a line (all)")
    text = "inner tars of any wnids, as in ImageNet-21K; with --splits train --layout wnid"
    add("--any-wnids", action="store_true", help=text)
    add("--layout", choices=LAYOUTS, default="index", help="class folders 0, 0000 or n01440764 (%(default)s)")


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_workers(parser)
    text = "what runs the shards: joblib's processes here, this process alone, or a Dask cluster (%(default)s)"
    add("--executor", choices=("local", "serial", "dask"), default="local", help=text)
    add("--dask-scheduler", metavar="ADDRESS", help="such as tcp://node1:8786")
    add("--dask-scheduler-file", metavar="F", help="the file that `dask scheduler --scheduler-file` writes")
    text = "part I of N of one plan, from 0; auto: by the batch system's variables; 0/1 checks and publishes (0/1)"
    add("--shard", type=_shard, default=Part(), metavar="I/N|auto", help=text)
    add(
        "--verify-archives",
        choices=("none", "size", "digest"),
        default="size",
        help="hold the archives against the published figures first (%(default)s)",
    )
    for kind in ("read", "write"):
        text = f"{kind} at most so many bytes/s, over all runs of this user on a host: 50MB, 1GiB (no limit)"
        add(f"--max-{kind}-rate", type=_rate, default=0.0, metavar="BYTES", help=text)
    text = "create at most so many files/s, likewise (no limit)"
    add("--max-create-rate", type=_rate, default=0.0, metavar="FILES", help=text)
    text = "begin nothing while less is free on the target: 512M, 2GiB, 5%%; 0: off (1GiB; less where that is small)"
    add("--min-free-space", type=_amount, metavar="BYTES", help=text)
    text = "begin nothing while less memory is left to this job; 0: off (512MiB; less where that is small)"
    add("--min-free-memory", type=_amount, metavar="BYTES", help=text)
    text = "end with 6 when work has waited so long for room or for workers (%(default)g)"
    add("--stall-timeout", type=seconds, default=DEFAULT_STALL_S, metavar="SECONDS", help=text)
    text = "leave no page cache behind the written files (Linux 6.14 and later)"
    add("--uncached-writes", action="store_true", help=text)
    add("--keep-mtime", action="store_true", help="give files the modification times in the archive")
    add("--restart", action="store_true", help="throw the unfinished run away and begin again")
    add("--force", action="store_true", help="begin even where the room on the target seems too small")
    _add_output_options(parser)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=_workers, default=None, metavar="N|auto", help="worker processes (auto: this job's CPUs)"
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--progress",
        choices=PROGRESS_KINDS,
        default="auto",
        help="on stderr; auto: a bar on a terminal, else a line now and then (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout at the end")


def _positive(text: str) -> int:
    value = _count(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def size_bytes(text: str) -> int:
    """Read `512M`, `2GiB`, `50MB`: as in dd, `M` and `MiB` are 2**20, `MB` is 10**6.

    Raises:
        ValueError: it is no amount.
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*(?:([KMGTP])(i?B)?|B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(text)
    power = 1 + "KMGTP".index(match[2].upper()) if match[2] else 0
    return int(float(match[1]) * (1000 if (match[3] or "").upper() == "B" else 1024) ** power)


def _rate(text: str) -> float:
    try:
        value = size_bytes(text.removesuffix("/s"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate: give 500, 50MB or 1GiB") from None
    if value == 0:
        raise argparse.ArgumentTypeError("must be more than 0; leave it out for no limit")
    return float(value)


def _amount(text: str) -> int | float:
    """Bytes as an int, a percentage as a fraction."""
    share = re.fullmatch(r"([0-9]{1,2}(?:\.[0-9]{1,3})?)%", text.strip())
    if share:
        return float(share[1]) / 100
    try:
        return size_bytes(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount: give 512M, 2GiB or 5%") from None


def seconds(text: str) -> float:
    """Read `90`, `90s`, `5m` or `1h`."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    try:
        value = float(text[:-1] if unit else text) * (unit or 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give 90, 90s, 5m or 1h")
    return value


def _workers(text: str) -> int | None:
    return None if text == "auto" else _positive(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_positive(number) for number in text.split(","))


def _shard(text: str) -> Part | str:
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text, re.ASCII)
    if text == "auto":
        return text
    if match is None or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: give I/N with I from 0 to N-1, or auto")
    return Part(index=int(match[1]), count=int(match[2]))


def _splits(text: str) -> tuple[SplitName, ...]:
    names = text.split(",")
    if not set(names) <= set(SPLITS):
        raise argparse.ArgumentTypeError(f"{text!r}: give train, val or train,val")
    return tuple(split for split in SPLITS if split in names)
