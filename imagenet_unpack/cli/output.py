"""Results as lines for people and as the JSON objects of the contract: of a plan, a run, a check, a failure."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from imagenet_unpack import options
from imagenet_unpack.checking.checker import by_class
from imagenet_unpack.errors import CheckError, ExitCode, UnpackError
from imagenet_unpack.host.resources import Room
from imagenet_unpack.model import Problem, RunSummary, SplitCheck, SplitName, SplitPlan
from imagenet_unpack.run.tune import Trial
from imagenet_unpack.text import human_bytes

SHOWN_PROBLEMS = 20
_RUN_STATUS = {
    ExitCode.OK: "complete",
    ExitCode.SHARDS_FAILED: "failed",
    ExitCode.CHECK_DIFFERS: "failed",
    ExitCode.CANNOT_START: "failed",
    ExitCode.STOPPED: "incomplete",
}


def json_object(args: argparse.Namespace, **members: Any) -> str:
    """Return the JSON object of a command in one line.

    Args:
        args: the command line; `began_s` is when the command began.
        members: what the object holds beside what every object holds, or instead of it.
    """
    base = {
        "schema": 1,
        "command": args.command,
        "status": "ok",
        "exit_code": 0,
        "target": _absolute(_target(args)),
        "elapsed_s": round(time.monotonic() - args.began_s, 3),
        "splits": {},
    }
    if args.command == "unpack":
        executor = getattr(args, "executor", "local")
        workers = {"dask": 0, "serial": 1}.get(executor)
        if workers is None:
            workers = options.worker_count(getattr(args, "workers", None))
        base |= {"workers": workers, "failures": []}
    return json.dumps(base | members)


def failure_object(args: argparse.Namespace, error: UnpackError) -> str:
    """Return the JSON object of a command that failed; "" where there is none (exit codes 1 and 2)."""
    if error.exit_code in (ExitCode.DEFECT, ExitCode.USAGE):
        return ""
    status = "differs" if args.command == "check" and isinstance(error, CheckError) else "failed"
    return json_object(args, status=status, exit_code=int(error.exit_code), message=str(error))


def interrupted_object(args: argparse.Namespace, code: int) -> str:
    """Return the JSON object of a command that a signal ended."""
    return json_object(args, status="interrupted", exit_code=code)


def _absolute(path: Path) -> str:
    try:
        return str(path.absolute())
    except FileNotFoundError:  # the working folder was removed
        return str(path)


def _target(args: argparse.Namespace) -> Path:
    base = Path(getattr(args, "base_dir", "."))
    return Path(getattr(args, "target", None) or getattr(args, "target_dir", None) or base / "ImageNet")


def run_object(summary: RunSummary) -> dict[str, Any]:
    """Return the contract's JSON members of a run."""
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
    failures = [{"shard": each.shard, "kind": each.kind, "message": each.message} for each in summary.failures]
    status = _RUN_STATUS.get(ExitCode(summary.exit_code), "interrupted")
    return {"status": status, "exit_code": int(summary.exit_code), "splits": splits, "failures": failures}


def run_lines(summary: RunSummary) -> Iterator[str]:
    """Yield what went wrong in a run."""
    for failure in summary.failures:
        if failure.fatal:  # the message says it
            continue
        yield f"{failure.split} {failure.shard}: {failure.message}"
        if failure.traceback:
            yield failure.traceback
    for problem in summary.problems[:SHOWN_PROBLEMS]:
        yield problem_line(problem)
    if summary.message:
        yield summary.message


def standing(summary: RunSummary) -> str:
    """Say in a line what stands where."""
    return "; ".join(
        f"{name} {split.status}, {split.images:,} images of {split.classes:,} classes, {human_bytes(split.size_bytes)}"
        for name, split in summary.splits.items()
    )


def plan_object(plans: dict[SplitName, SplitPlan], room: Room) -> dict[str, Any]:
    """Return the JSON members of a plan; a file system that does not count files gives `files_free` null."""
    splits = {
        name: {
            "archive": plan.archive.path,
            "official": plan.archive.official,
            "classes": len(plan.classes),
            "images": plan.images,
            "images_exact": plan.images_exact,
            "bytes": plan.content_bytes,
            "shards": len(plan.shards),
            "largest_shard": max((shard.size_bytes for shard in plan.shards), default=0),
            "notes": list(plan.notes),
        }
        for name, plan in plans.items()
    }
    return {
        "bytes_needed": room.bytes_needed,
        "bytes_free": room.bytes_free,
        "files_needed": room.files_needed,
        "files_free": room.files_free,
        "fits": room.fault is None,
        "splits": splits,
    }


def plan_lines(plans: dict[SplitName, SplitPlan], target: str, room: Room) -> Iterator[str]:
    """Yield a plan as a short table."""
    yield f"{'split':6}{'classes':>8}{'images':>12}{'bytes':>12}{'shards':>8}{'largest':>10}  archive"
    for name, plan in plans.items():
        images = f"{'' if plan.images_exact else '~'}{plan.images:,}"
        largest = human_bytes(max((shard.size_bytes for shard in plan.shards), default=0))
        yield (
            f"{name:6}{len(plan.classes):>8}{images:>12}{human_bytes(plan.content_bytes):>12}{len(plan.shards):>8}"
            f"{largest:>10}  {plan.archive.path}"
        )
    files = "an unknown number of" if room.files_free is None else f"{room.files_free:,}"
    yield (
        f"target {target}: needs about {human_bytes(room.bytes_needed)} and {room.files_needed:,} files; "
        f"{human_bytes(room.bytes_free)} and {files} files are free"
    )


TRIAL_HEADER = "workers     MB/s  images/s  CPU s/GB"


def trial_line(trial: Trial) -> str:
    """Return a row below `TRIAL_HEADER`."""
    per_gb = trial.cpu_s / (trial.size_bytes / 1e9)
    return f"{trial.workers:>7}{trial.bytes_per_s / 1e6:>9,.0f}{trial.images / trial.elapsed_s:>10,.0f}{per_gb:>10.2f}"


def trial_object(trial: Trial) -> dict[str, Any]:
    """Return a trial as a JSON object."""
    return asdict(trial) | {"bytes_per_s": round(trial.bytes_per_s)}


def advice_line(advice: Trial, best: Trial) -> str:
    """Say which number of workers to use."""
    line = f"use --workers {advice.workers}: {advice.bytes_per_s / 1e6:,.0f} MB/s"
    if advice is best:
        return f"{line}, the best of these"
    return f"{line}, within {1 - advice.bytes_per_s / best.bytes_per_s:.1%} of the best ({best.workers} workers)"


def check_object(results: Sequence[SplitCheck]) -> dict[str, Any]:
    """Return the contract's JSON members of a check."""
    return {
        result.split: {
            "classes": result.classes,
            "images": result.images,
            "problems": [_problem(problem) for problem in result.problems],
        }
        for result in results
    }


def check_lines(results: Sequence[SplitCheck]) -> Iterator[str]:
    """Yield a line for each split, a table of its differences by class, and the first of them one by one."""
    for result in results:
        verdict = f"{len(result.problems):,} differences found" if result.problems else "whole"
        yield f"{result.split}: {verdict}: {result.images:,} images of {result.classes:,} classes"
        table = by_class(result.problems)
        for name, kinds in table[:SHOWN_PROBLEMS]:
            amounts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
            yield f"  {name or '(split)':>10}  {amounts}"
        if len(table) > SHOWN_PROBLEMS:
            yield f"  and {len(table) - SHOWN_PROBLEMS:,} more classes: --json lists everything"
        for problem in result.problems[:SHOWN_PROBLEMS]:
            yield f"  {problem_line(problem)}"
        if len(result.problems) > SHOWN_PROBLEMS:
            yield f"  and {len(result.problems) - SHOWN_PROBLEMS:,} more differences: --json lists them all"


def problem_line(problem: Problem) -> str:
    """Say one difference in a line."""
    where = problem.path or (f"class {problem.class_name}" if problem.class_name else "the split")
    values = (("expected", problem.expected), ("found", problem.found))
    amounts = ", ".join(f"{word} {value}" for word, value in values if value is not None)
    return f"{where}: {problem.kind}" + (f" ({amounts})" if amounts else "")


def _problem(problem: Problem) -> dict[str, Any]:
    values = asdict(problem)
    return {"class": values.pop("class_name"), **values}
