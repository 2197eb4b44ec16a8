"""The edge: arguments to a run, outcome to an exit code. The only place that prints or reads the environment."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from imagenet_unpack import __version__, checker, host, ilsvrc2012, labels, planner, runner, synth
from imagenet_unpack.errors import ArchiveError, CheckError, ExitCode, UnpackError, UsageError
from imagenet_unpack.executors import Executor, LocalExecutor, SerialExecutor
from imagenet_unpack.model import LAYOUTS, SPLITS, Problem, ShardFailed, SplitName, SplitPlan, class_refs
from imagenet_unpack.progress import make_reporter
from imagenet_unpack.splitrun import Replan
from imagenet_unpack.text import human_bytes, human_time

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_COMMANDS = ("unpack", "plan", "check", "synth", "demo")
_SHOWN_PROBLEMS = 20
_EXIT_CODES = """exit codes:
  0  done: every split asked for is published and checked
  1  a defect of the program, with a traceback
  2  usage: bad option or value
  3  some shards failed; nothing of those splits is published; the same command tries them again
  4  the check found differences
  5  it could not start: archive, labels or target missing, damaged, in use or without room
  6  it had to stop part way: disk full, quota, I/O error; the same command continues
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
    demo = add("demo", "synth into a temporary folder, unpack and check it")
    _add_workers(demo)
    return parser


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
    add("--layout", choices=LAYOUTS, default="index", help="class folders 0, 0000 or n01440764 (%(default)s)")


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_workers(parser)
    add("--executor", choices=("local", "serial"), default="local", help="what runs the shards (%(default)s)")
    add(
        "--verify-archives",
        choices=("none", "size", "digest"),
        default="size",
        help="hold the archives against the published figures first (%(default)s)",
    )
    add("--keep-mtime", action="store_true", help="give files the modification times in the archive")
    add("--restart", action="store_true", help="throw the unfinished run away and begin again")
    _add_output_options(parser)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=_workers, default=None, metavar="N|auto", help="worker processes (auto: this job's CPUs)"
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--progress",
        choices=("auto", "bar", "log", "json", "none"),
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


def _workers(text: str) -> int | None:
    return None if text == "auto" else _positive(text)


def _splits(text: str) -> tuple[SplitName, ...]:
    names = text.split(",")
    if not set(names) <= set(SPLITS):
        raise argparse.ArgumentTypeError(f"{text!r}: give train, val or train,val")
    return tuple(split for split in SPLITS if split in names)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        arguments.insert(0, "unpack")
    args = build_parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, format="imagenet_unpack: %(message)s", level=logging.WARNING)
    began = time.monotonic()
    commands = {"unpack": _unpack, "plan": _plan, "check": _check, "synth": _synth, "demo": _demo}
    try:
        return commands[args.command](args, began)
    except UnpackError as error:
        if getattr(args, "json", False) and error.exit_code != ExitCode.USAGE:
            status = "differs" if args.command == "check" and isinstance(error, CheckError) else "failed"
            _print_json(args, status, error.exit_code, began, message=str(error))
        _say(f"imagenet_unpack: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.SIGINT
    except BrokenPipeError:
        # Whoever read our output has gone; keep the interpreter from failing once more as it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.DEFECT
    except Exception:  # noqa: BLE001 - the edge: a defect becomes a traceback and a code
        traceback.print_exc()
        _say("imagenet_unpack: this is a defect of the program: please report it with the lines above")
        return ExitCode.DEFECT


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _print_json(args: argparse.Namespace, status: str, code: int, began: float, **more: Any) -> None:
    base = {
        "schema": 1,
        "command": args.command,
        "status": status,
        "exit_code": int(code),
        "target": str(_target(args).absolute()),
        "elapsed_s": round(time.monotonic() - began, 3),
        "splits": {},
    }
    if args.command == "unpack":
        base |= {"workers": _worker_count(args), "failures": []}
    print(json.dumps(base | more), flush=True)


def _target(args: argparse.Namespace) -> Path:
    if args.command == "check":
        return Path(args.target)
    return Path(args.target_dir or args.base_dir / "ImageNet")


def _worker_count(args: argparse.Namespace) -> int:
    if getattr(args, "executor", "") == "serial":
        return 1
    return args.workers or host.usable_cpus(os.environ)


def _replans(args: argparse.Namespace) -> tuple[dict[SplitName, Replan], tuple[int, ...] | None]:
    """Find archives and label files; return how to plan each split, and the classes asked for."""
    base: Path = args.base_dir
    archives: dict[SplitName, Path] = {
        "train": args.train_archive or base / ilsvrc2012.TRAIN_ARCHIVE_NAME,
        "val": args.val_archive or base / ilsvrc2012.VAL_ARCHIVE_NAME,
    }
    named: dict[SplitName, Path | None] = {"train": args.train_archive, "val": args.val_archive}
    for split in args.splits or SPLITS:
        if (args.splits or named[split]) and not archives[split].exists():
            raise ArchiveError(f"{archives[split]}: no such file: it is needed for the {split} split")
    splits = args.splits or tuple(split for split in SPLITS if archives[split].exists())
    if not splits:
        raise ArchiveError(
            f"neither {archives['train']} nor {archives['val']} is there: "
            "give --base-dir, --train-archive or --val-archive"
        )
    wnids = labels.load_class_index(_given(args.class_index, base / "ImageNet_class_index.json"))
    refs = class_refs(wnids, args.layout)
    asked = planner.parse_classes(args.classes, wnids) if args.classes is not None else None
    replans: dict[SplitName, Replan] = {}
    if "train" in splits:
        replans["train"] = lambda wanted: planner.plan_train(archives["train"], refs, wanted, args.layout)
    if "val" in splits:
        val_labels = labels.load_val_labels(_given(args.val_labels, base / "ImageNet_val_label.txt"), wnids)
        replans["val"] = lambda wanted: planner.plan_val(archives["val"], refs, wanted, args.layout, val_labels)
    return replans, asked


def _given(explicit: Path | None, default: Path) -> Path | None:
    """A file named by an option must be there; one of the usual name counts when it is."""
    return explicit or (default if default.exists() else None)


def _unpack(args: argparse.Namespace, began: float) -> int:
    workers = _worker_count(args)
    executor: Executor = SerialExecutor() if args.executor == "serial" else LocalExecutor(workers)
    reporter = make_reporter(args.progress, sys.stderr)
    stop = runner.StopRequest()
    target = _target(args).absolute()
    try:
        with _signals(stop, executor):
            replans, asked = _replans(args)
            options = runner.Options(
                target=target,
                planners=replans,
                classes=asked,
                verify=_verifier(args.verify_archives),
                time_counts=args.verify_archives != "digest",
                restart=args.restart,
                keep_mtime=args.keep_mtime,
            )
            summary = runner.run(options, executor, reporter, stop)
    finally:
        reporter.close()
    elapsed = time.monotonic() - began
    for failure in summary.failures:
        _say(f"imagenet_unpack: {failure.split} {failure.shard}: {failure.message}")
        if failure.traceback:
            _say(failure.traceback)
    for problem in summary.problems[:_SHOWN_PROBLEMS]:
        _say(f"imagenet_unpack: {_problem_line(problem)}")
    if summary.message:
        _say(f"imagenet_unpack: {summary.message}")
    if args.json:
        status = {0: "complete", 3: "failed", 4: "failed", 6: "incomplete"}.get(summary.exit_code, "interrupted")
        splits = {
            name: {
                "status": split.status,
                "classes": split.classes,
                "images": split.images,
                "bytes": split.size_bytes,
                "shards": split.shards,
                "shards_skipped": split.shards_skipped,
                "shards_failed": split.shards_failed,
            }
            for name, split in summary.splits.items()
        }
        failures = [_failure(failure) for failure in summary.failures]
        _print_json(args, status, summary.exit_code, began, splits=splits, failures=failures)
    if args.progress in ("auto", "bar", "log"):
        stands = "; ".join(
            f"{name} {split.status}, {split.images:,} images of {split.classes:,} classes, "
            f"{human_bytes(split.size_bytes)}"
            for name, split in summary.splits.items()
        )
        verdict = "done" if summary.exit_code == ExitCode.OK else "ended"
        _say(f"{verdict} in {human_time(elapsed)} with {workers} workers: {target}: {stands}")
    return summary.exit_code


def _failure(failure: ShardFailed) -> dict[str, str]:
    return {"shard": failure.shard, "kind": failure.kind, "message": failure.message}


def _verifier(level: str) -> Any:
    def verify(plan: SplitPlan) -> None:
        if level == "digest":
            planner.verify_digest(plan.archive, plan.split)

    return verify


@contextlib.contextmanager
def _signals(stop: runner.StopRequest, executor: Executor) -> Iterator[None]:
    """Turn the contract's signals into stop requests; a second Ctrl-C ends the program on the spot."""

    def handle(number: int, _frame: object) -> None:
        if stop.signal == signal.SIGINT and number == signal.SIGINT:
            executor.kill()
            os._exit(ExitCode.SIGINT)
        stop.request(number)

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _plan(args: argparse.Namespace, began: float) -> int:
    replans, asked = _replans(args)
    plans = {name: replan(asked) for name, replan in replans.items()}
    for plan in plans.values():
        _verifier(args.verify_archives)(plan)
    target = _target(args)
    existing = next(folder for folder in (target.absolute(), *target.absolute().parents) if folder.exists())
    stat = os.statvfs(existing)
    free = stat.f_bavail * stat.f_frsize
    free_files = stat.f_favail if stat.f_files else None
    need = sum(plan.content_bytes for plan in plans.values())
    if args.json:
        _print_json(
            args,
            "ok",
            0,
            began,
            layout=args.layout,
            bytes_needed=need,
            bytes_free=free,
            files_free=free_files,
            splits={
                name: {
                    "archive": plan.archive.path,
                    "official": plan.archive.official,
                    "classes": len(plan.classes),
                    "images": plan.images,
                    "bytes": plan.content_bytes,
                    "shards": len(plan.shards),
                    "largest_shard": max((shard.size_bytes for shard in plan.shards), default=0),
                    "notes": list(plan.notes),
                }
                for name, plan in plans.items()
            },
        )
        return ExitCode.OK
    print(f"{'split':6}{'classes':>8}{'images':>11}{'bytes':>12}{'shards':>8}{'largest':>10}  archive")
    for name, plan in plans.items():
        images = f"{plan.images:,}" if plan.images is not None else "?"
        largest = human_bytes(max((shard.size_bytes for shard in plan.shards), default=0))
        print(
            f"{name:6}{len(plan.classes):>8}{images:>11}{human_bytes(plan.content_bytes):>12}{len(plan.shards):>8}"
            f"{largest:>10}  {plan.archive.path}"
        )
        for note in plan.notes:
            _say(f"note: {note}")
    files = "an unknown number of" if free_files is None else f"{free_files:,}"
    print(f"target {target}: needs {human_bytes(need)}; {human_bytes(free)} and {files} files are free")
    return ExitCode.OK


def _check(args: argparse.Namespace, began: float) -> int:
    reporter = make_reporter(args.progress, sys.stderr)
    try:
        reporter.phase("checking", None, None)
        results = checker.check_target(
            args.target,
            depth="digests" if args.deep else "names",
            workers=_worker_count(args),
            advance=lambda images: reporter.advance(nbytes=0, images=images, shards=0),
        )
    finally:
        reporter.close()
    problems = [problem for result in results for problem in result.problems]
    code = ExitCode.CHECK_DIFFERS if problems else ExitCode.OK
    if args.json:
        splits = {
            result.split: {
                "classes": result.classes,
                "images": result.images,
                "problems": [_problem(problem) for problem in result.problems],
            }
            for result in results
        }
        _print_json(args, "differs" if problems else "ok", code, began, splits=splits)
        return code
    for result in results:
        verdict = f"{len(result.problems):,} differences found" if result.problems else "whole"
        print(f"{result.split}: {verdict}: {result.images:,} images of {result.classes:,} classes")
        _print_table(result.problems)
    return code


def _print_table(problems: tuple[Problem, ...]) -> None:
    """Print a table of differences by class, then the first of them one by one."""
    table = checker.by_class(problems)
    for name, kinds in table[:_SHOWN_PROBLEMS]:
        print(f"  {name or '(split)':>10}  {', '.join(f'{count:,} {kind}' for kind, count in sorted(kinds.items()))}")
    if len(table) > _SHOWN_PROBLEMS:
        print(f"  and {len(table) - _SHOWN_PROBLEMS:,} more classes: --json lists everything")
    for problem in problems[:_SHOWN_PROBLEMS]:
        print(f"  {_problem_line(problem)}")
    if len(problems) > _SHOWN_PROBLEMS:
        print(f"  and {len(problems) - _SHOWN_PROBLEMS:,} more differences: --json lists them all")


def _problem(problem: Problem) -> dict[str, Any]:
    values = asdict(problem)
    return {"class": values.pop("class_name"), **values}


def _problem_line(problem: Problem) -> str:
    where = problem.path or (f"class {problem.class_name}" if problem.class_name else "the split")
    values = (("expected", problem.expected), ("found", problem.found))
    amounts = ", ".join(f"{word} {value}" for word, value in values if value is not None)
    return f"{where}: {problem.kind}" + (f" ({amounts})" if amounts else "")


def _synth(args: argparse.Namespace, began: float) -> int:
    spec = synth.SynthSpec(
        classes=args.classes,
        images_per_class=None if args.real_counts else args.images,
        val_images=args.val_images,
        seed=args.seed,
        mean_bytes=args.mean_bytes,
        tar_format=args.format,
        bodies=args.bodies,
        label_files=not args.no_labels,
    )
    if args.classes > len(ilsvrc2012.WNIDS):
        raise UsageError(f"--classes {args.classes}: there are {len(ilsvrc2012.WNIDS)}")
    synth.write_archives(args.folder, spec)
    print(f"wrote {args.folder} in {human_time(time.monotonic() - began)}")
    return ExitCode.OK


def _demo(args: argparse.Namespace, began: float) -> int:
    with tempfile.TemporaryDirectory(prefix="imagenet_unpack-demo-") as folder:
        print(f"1. synth: small archives of ImageNet's shape into {folder}", flush=True)
        synth.write_archives(Path(folder), synth.SynthSpec())
        workers = ["--workers", str(_worker_count(args))]
        for number, command in enumerate((["--base-dir", folder, *workers], ["check", f"{folder}/ImageNet", "--deep"])):
            print(f"{number + 2}. python -m imagenet_unpack {' '.join(command)}", flush=True)
            code = main(command)
            if code:
                return code
        print(f"done in {human_time(time.monotonic() - began)}; the temporary folder is removed again")
    return ExitCode.OK
