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
from pathlib import Path
from typing import Any

from imagenet_unpack.checking import checker
from imagenet_unpack.cli import batch, output
from imagenet_unpack.cli.arguments import parse
from imagenet_unpack.cli.progress import make_reporter
from imagenet_unpack.dataset import ilsvrc2012, labels, synth
from imagenet_unpack.errors import ArchiveError, CheckError, ExitCode, UnpackError, UsageError
from imagenet_unpack.extract.throttle import Limits
from imagenet_unpack.host import pool, resources
from imagenet_unpack.model import SPLITS, Part, SplitName, SplitPlan, class_refs
from imagenet_unpack.planning import planner
from imagenet_unpack.run import runner, tune
from imagenet_unpack.run.executors import Executor, LocalExecutor, SerialExecutor
from imagenet_unpack.run.splitrun import Replan
from imagenet_unpack.text import human_time


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        arguments.insert(0, "unpack")
    args = parse(arguments)
    _configure_logging()
    began = time.monotonic()
    commands = {
        "sbatch": _sbatch,
        "tune": _tune,
        "unpack": _unpack,
        "plan": _plan,
        "check": _check,
        "synth": _synth,
        "demo": _demo,
    }
    try:
        return commands[args.command](args, began)
    except UnpackError as error:
        if getattr(args, "json", False) and error.exit_code != ExitCode.USAGE:
            status = "differs" if args.command == "check" and isinstance(error, CheckError) else "failed"
            _print_json(args, began, status=status, exit_code=int(error.exit_code), message=str(error))
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


def _configure_logging() -> None:
    """Show this program's own warnings; what libraries log of their troubles is told in its words, in one line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("imagenet_unpack: %(message)s"))
    logging.getLogger("imagenet_unpack").handlers = [handler]
    logging.getLogger("imagenet_unpack").propagate = False
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(logging.NullHandler())


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _print_json(args: argparse.Namespace, began: float, **members: Any) -> None:
    base = {
        "schema": 1,
        "command": args.command,
        "status": "ok",
        "exit_code": 0,
        "target": str(_target(args).absolute()),
        "elapsed_s": round(time.monotonic() - began, 3),
        "splits": {},
    }
    if args.command == "unpack":
        base |= {"workers": 0 if args.executor == "dask" else _worker_count(args), "failures": []}
    print(json.dumps(base | members), flush=True)


def _target(args: argparse.Namespace) -> Path:
    if args.command == "check":
        return Path(args.target)
    return Path(args.target_dir or args.base_dir / "ImageNet")


def _worker_count(args: argparse.Namespace) -> int:
    if getattr(args, "executor", "") == "serial":
        return 1
    wanted: int = args.workers or resources.usable_cpus(os.environ)
    return resources.workers_that_fit(wanted, resources.memory())


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
    if args.any_wnids:
        if splits != ("train",) or args.layout != "wnid":
            raise UsageError("--any-wnids goes with --splits train --layout wnid: other classes have no labels here")
        if args.classes is not None:
            raise UsageError("--any-wnids takes every class of the archive: leave --classes out")
        return {"train": lambda _: planner.plan_train(archives["train"], None, None, args.layout)}, None
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
    if args.workers is not None and args.executor == "local" and workers < args.workers:
        _say(f"imagenet_unpack: memory leaves room for {workers} of {args.workers} workers")
    reporter = make_reporter(args.progress, sys.stderr)
    executor = _executor(args, workers)
    workers = executor.workers
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
                part=_part(args),
                restart=args.restart,
                limits=_limits(args, target),
                keep_mtime=args.keep_mtime,
                uncached_writes=args.uncached_writes,
                force=args.force,
            )
            summary = runner.run(options, executor, reporter, stop)
    finally:
        reporter.close()
    for line in output.run_lines(summary):
        _say(f"imagenet_unpack: {line}")
    if args.json:
        _print_json(args, began, workers=workers, **output.run_object(summary))
    if args.progress in ("auto", "bar", "log"):
        verdict = "done" if summary.exit_code == ExitCode.OK else "ended"
        elapsed = human_time(time.monotonic() - began)
        _say(f"{verdict} in {elapsed} with {workers} workers: {target}: {output.standing(summary)}")
    return summary.exit_code


def _executor(args: argparse.Namespace, workers: int) -> Executor:
    where = args.dask_scheduler or args.dask_scheduler_file
    if (args.executor == "dask") != (where is not None):
        raise UsageError("--executor dask goes with --dask-scheduler ADDRESS or --dask-scheduler-file F")
    if args.executor == "dask":
        from imagenet_unpack.run.dask_executor import DaskExecutor  # noqa: PLC0415 - half a second, and an extra

        return DaskExecutor(args.dask_scheduler, args.dask_scheduler_file, stall_timeout_s=args.stall_timeout)
    return SerialExecutor() if args.executor == "serial" else LocalExecutor(workers)


def _part(args: argparse.Namespace) -> Part:
    part: Part = batch.part_of(os.environ) if args.shard == "auto" else args.shard
    if part.source:
        _say(f"imagenet_unpack: part {part.index}/{part.count}, by {part.source}")
    if args.restart and not part.whole:
        raise UsageError("--restart would throw the other parts' work away: run once with --shard 0/1 --restart")
    return part


def _limits(args: argparse.Namespace, target: Path) -> Limits:
    """Turn percentages into bytes of the target's file system and of this job's memory."""

    def mark(given: float | None, total: int) -> int:
        if given is None:
            return runner.DEFAULT
        return round(given * total) if isinstance(given, float) else given

    return Limits(
        free_space=mark(args.min_free_space, resources.room(target, content_bytes=0, files=0).bytes_total),
        free_memory=mark(args.min_free_memory, resources.memory().total),
        read_rate=args.max_read_rate,
        write_rate=args.max_write_rate,
        create_rate=args.max_create_rate,
        stall_timeout_s=args.stall_timeout,
    )


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

    before = {number: signal.signal(number, handle) for number in pool.SIGNALS}
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
    room = resources.room(target, **planner.needs(plans.values()))
    if args.json:
        here = {
            "cpus": resources.usable_cpus(os.environ),
            "memory_available": resources.memory().available,
            "dirty_bytes": resources.dirty_bytes(),
            "memory_pressure": resources.pressure("memory"),
            "io_pressure": resources.pressure("io"),
        }
        _print_json(args, began, layout=args.layout, host=here, **output.plan_object(plans, room))
        return ExitCode.OK
    for line in output.plan_lines(plans, str(target), room):
        print(line)
    for note in (note for plan in plans.values() for note in plan.notes):
        _say(f"note: {note}")
    if room.fault is not None:
        _say(f"note: {room.fault}")
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
    differs = any(result.problems for result in results)
    code = ExitCode.CHECK_DIFFERS if differs else ExitCode.OK
    if args.json:
        status = "differs" if differs else "ok"
        _print_json(args, began, status=status, exit_code=int(code), splits=output.check_object(results))
        return code
    for line in output.check_lines(results):
        print(line)
    return code


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


def _sbatch(args: argparse.Namespace, _began: float) -> int:
    cpus: dict[str, int] = {} if args.workers is None else {"cpus": args.workers}
    resources = batch.Resources(
        parts=args.parts,
        memory=args.memory,
        time=args.time,
        account=args.account,
        partition=args.partition,
        job_name=args.job_name,
        signal_s=args.signal_before,
        **cpus,
    )
    print(batch.slurm_script(sys.executable, args.unpack_arguments, resources, os.getcwd()), end="")
    return ExitCode.OK


def _tune(args: argparse.Namespace, began: float) -> int:
    archive = args.train_archive or args.base_dir / ilsvrc2012.TRAIN_ARCHIVE_NAME
    target = args.target_dir or args.base_dir
    if not target.is_dir():
        raise UsageError(f"--target-dir {target}: give an existing folder on the storage to be tried")
    plan = planner.plan_train(archive, None, None, "wnid")
    numbers = args.workers or tune.ladder(resources.usable_cpus(os.environ))
    _say(output.TRIAL_HEADER)
    trials = []
    for trial in tune.run_trials(plan, target, numbers, sample_bytes=int(args.sample), budget_s=args.budget):
        trials.append(trial)
        _say(output.trial_line(trial))
    advice, best = tune.recommend(trials)
    if args.json:
        found = {"trials": [output.trial_object(trial) for trial in trials], "workers": advice.workers}
        _print_json(args, began, target=str(target.absolute()), **found)
    else:
        print(output.advice_line(advice, best))
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
