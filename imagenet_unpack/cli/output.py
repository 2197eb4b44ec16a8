"""Results as lines for people and as the JSON objects that scripts rely on: of a plan, a run, a check, a failure."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagenet_unpack.checking.findings import by_class, is_of_manifest
from imagenet_unpack.errors import CheckError, ExitCode, UnpackError
from imagenet_unpack.host import resources
from imagenet_unpack.model import Problem, RunSummary, SplitCheck, SplitSummary
from imagenet_unpack.text import counted, human_bytes, human_time, printable

if TYPE_CHECKING:  # `unpack` needs neither, and its first image waits for what is imported
    from imagenet_unpack.api import PlanResult
    from imagenet_unpack.run.tune import Trial

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
            workers = resources.worker_count(getattr(args, "workers", None))
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
    """Return the JSON members of a run."""
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
        yield from failure.traceback.splitlines()
    for problem in summary.problems[:SHOWN_PROBLEMS]:
        yield problem_line(problem)
    if summary.message:
        yield summary.message


def nothing_done(summary: RunSummary) -> bool:
    """Say whether everything asked for was published before this run."""
    return summary.exit_code == ExitCode.OK and all(
        split.status == "published" and split.shards_skipped == split.shards for split in summary.splits.values()
    )


def standing(summary: RunSummary) -> str:
    """Say in a line what is there after a run."""
    splits = summary.splits
    if nothing_done(summary):
        names = " and ".join(splits)
        return f"nothing to do: {names} {'is' if len(splits) == 1 else 'are'} already complete"
    return "; ".join(f"{name}: {_split_standing(split)}" for name, split in splits.items())


def _split_standing(split: SplitSummary) -> str:
    if split.status == "published":
        return f"{counted(split.images, 'image')}{_in_classes(split.classes)}, {human_bytes(split.size_bytes)}"
    total = "" if split.images_expected is None else f" of {split.images_expected:,}"
    images = f"{split.images:,}{total} images"
    if not split.images:
        return f"not started ({images})" if total else "not started"
    failed = f", {split.shards_failed} failed" if split.shards_failed else ""
    return f"not finished ({images}{_in_classes(split.classes)} so far{failed})"


def _in_classes(classes: int) -> str:
    return f" in {counted(classes, 'class')}" if classes else ""  # the test split has none


LAYOUT_NOTE = (
    "note: --layout index names the folders 0, 1, 2, ...; most training libraries (torchvision, Keras, DALI, Hugging "
    "Face) sort such names as text and give 988 of the 1000 classes another index than the published one: use --layout "
    "wnid or padded for training with them"
)


_RATES_MB_PER_S = (100, 500, 2000)
_FILES_PER_S = 1000


def plan_object(plan: PlanResult) -> dict[str, Any]:
    """Return the JSON members of a plan.

    Null are `files_free` where files are not counted, and what is not known of a stream until it is read.
    """
    splits = {
        name: {
            "archive": split.archive.path,
            "source": split.source,
            "official": split.archive.official,
            "classes": split.class_count,
            "images": split.images if split.stream is None or split.content_bytes else None,
            "images_exact": split.images_exact,
            "images_left": plan.left[name].images,
            "bytes": split.content_bytes,
            "bytes_left": plan.left[name].content_bytes,
            "shards": len(split.shards) if split.stream is None else None,
            "shards_left": len(plan.left[name].shards) if plan.left[name].stream is None else None,
            "largest_shard": max(
                (shard.size_bytes for shard in split.shards), default=0 if split.stream is None else None
            ),
            "notes": list(split.notes),
        }
        for name, split in plan.splits.items()
    }
    return {
        "bytes_needed": plan.room.bytes_needed,
        "bytes_free": plan.room.bytes_free,
        "files_needed": plan.room.files_needed,
        "files_free": plan.room.files_free,
        "fits": plan.fits,
        "splits": splits,
    }


def plan_lines(plan: PlanResult) -> Iterator[str]:
    """Yield a plan as a short table, what is done of it already, what the rest needs and how long it would take."""
    yield f"{'split':6}{'classes':>8}{'images':>12}{'bytes':>12}{'shards':>8}{'largest':>10}  archive"
    for name, split in plan.splits.items():
        images = f"{'' if split.images_exact else '~'}{split.images:,}"
        shards, largest = (
            f"{len(split.shards)}",
            human_bytes(max((each.size_bytes for each in split.shards), default=0)),
        )
        size = human_bytes(split.content_bytes)
        if split.stream is not None:  # nothing is known until it is read; for a file the size is a guess
            shards = largest = "?"
            images, size = (images, f"~{size}") if split.content_bytes else ("?", "?")
        yield (
            f"{name:6}{split.class_count:>8}{images:>12}{size:>12}{shards:>8}"
            f"{largest:>10}  {split.archive.path}{f' ({split.source})' if split.source else ''}"
        )
    for name, split in plan.splits.items():
        left = plan.left[name]
        if not left.shards and left.stream is None:
            yield f"{name} is already complete in {plan.target}"
        elif left.content_bytes < split.content_bytes:
            done, rest = human_bytes(split.content_bytes - left.content_bytes), human_bytes(left.content_bytes)
            yield f"{name}: {done} are already done in {plan.target}, {rest} are left"
    content_bytes = sum(left.content_bytes for left in plan.left.values())
    if not content_bytes:
        return
    room = plan.room
    files = "an unknown number of" if room.files_free is None else f"{room.files_free:,}"
    yield (
        f"target {plan.target}: needs about {human_bytes(room.bytes_needed)} and {room.files_needed:,} files; "
        f"{human_bytes(room.bytes_free)} and {files} files are free"
    )
    times = ", ".join(f"{human_time(content_bytes / 1e6 / rate)} at {rate:,} MB/s" for rate in _RATES_MB_PER_S)
    creates_s = sum(left.images for left in plan.left.values()) / _FILES_PER_S
    yield f"time: {times}; at least {human_time(creates_s)} where the storage creates {_FILES_PER_S:,} files/s"


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
    """Return the JSON members of a check."""
    return {
        result.split: {
            "classes": result.classes,
            "images": result.images,
            "problems": [_problem(problem) for problem in result.problems],
        }
        | ({"notes": list(result.notes)} if result.notes else {})
        for result in results
    }


def check_lines(results: Sequence[SplitCheck], *, deep: bool) -> Iterator[str]:
    """Yield for each split a line, a table of its differences by class, the first of them one by one, and a remedy."""
    for result in results:
        yield f"{result.split}: {_verdict(result, deep=deep)}"
        if result.basis == "unfinished":
            continue
        table = by_class(result.problems)
        for name, kinds in table[:SHOWN_PROBLEMS]:
            amounts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
            yield f"  {printable(name) or '(split)':>10}  {amounts}"
        if len(table) > SHOWN_PROBLEMS:
            yield f"  and {counted(len(table) - SHOWN_PROBLEMS, 'more class')}: --json lists everything"
        for problem in result.problems[:SHOWN_PROBLEMS]:
            yield f"  {problem_line(problem)}"
        if len(result.problems) > SHOWN_PROBLEMS:
            yield f"  and {counted(len(result.problems) - SHOWN_PROBLEMS, 'more difference')}: --json lists them all"
        for note in result.notes:
            yield f"  note: {note}"
    yield from _remedies(results)


def _verdict(result: SplitCheck, *, deep: bool) -> str:
    if result.basis == "unfinished":
        return "not finished: an unfinished run is in .imagenet_unpack"
    what = "every byte" if deep else "names and counts"
    basis = {
        "manifest": f"its manifest ({what})",
        "image": f"the tables and the manifest of the image ({what})",
        "published facts": "the published names and counts (no manifest)",
    }
    images = counted(result.images, "image") + _in_classes(result.classes)
    verdict = f"{counted(len(result.problems), 'difference')} from" if result.problems else "whole, compared with"
    return f"{verdict} {basis[result.basis]}: {images}"


def _remedies(results: Sequence[SplitCheck]) -> Iterator[str]:
    differing = {result.basis for result in results if result.problems}
    if "image" in differing:
        yield "to replace it, remove it and run the same image command again (in place: run restore first)"
    if "unfinished" in differing:
        yield "to finish it, run the same unpack command again"
    if any(result.consumed and result.problems for result in results):
        yield "its archive was consumed (--consume): to repair it, get the archive again and run unpack with --repair"
    elif "manifest" in differing:
        yield from _tree_remedies([result for result in results if result.problems and result.basis == "manifest"])
    if "published facts" in differing:
        yield "to get a whole tree, unpack the archives into another --target-dir"


def _tree_remedies(results: Sequence[SplitCheck]) -> Iterator[str]:
    lost = [result.split for result in results if any(map(is_of_manifest, result.problems))]
    kinds = {problem.kind for result in results if result.split not in lost for problem in result.problems}
    if kinds - {"extra"}:
        yield "to repair it, run the same unpack command again with --repair"
    if "extra" in kinds:
        yield "what is extra is left alone: remove it yourself if you do not need it"
    for split in lost:
        yield f"the manifest is missing or damaged: move {split}/ away and run the same unpack command again"


def problem_line(problem: Problem) -> str:
    """Say one difference in a line."""
    where = problem.path or (f"class {problem.class_name}" if problem.class_name else "the split")
    values = (("expected", problem.expected), ("found", problem.found))
    amounts = ", ".join(f"{word} {value}" for word, value in values if value is not None)
    return printable(f"{where}: {problem.kind}" + (f" ({amounts})" if amounts else ""))


def _problem(problem: Problem) -> dict[str, Any]:
    values = asdict(problem)
    return {"class": values.pop("class_name"), **values}
