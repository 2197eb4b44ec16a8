"""`image`: one mountable file instead of a tree."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

from imagenet_unpack import options
from imagenet_unpack.cli import output, streams
from imagenet_unpack.cli.commands.unpack import read_options
from imagenet_unpack.cli.progress import make_reporter
from imagenet_unpack.cli.signals import taken_signals
from imagenet_unpack.errors import CancelledError, ExitCode, UsageError
from imagenet_unpack.model import Layout, RunSummary
from imagenet_unpack.reporter import Reporter
from imagenet_unpack.run import image
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.run.executors import Executor
from imagenet_unpack.text import human_time


def run(args: argparse.Namespace) -> int:
    """Make the image; how to mount it goes to stderr, the JSON object to stdout."""
    layouts = tuple(args.layouts or ("index",))
    in_place = args.method == "in-place"
    if in_place and args.output is not None:
        raise UsageError("--method in-place changes the archive itself: leave out --output, or use reflink or copy")
    file = (args.output or Path(getattr(args, "base_dir", ".")) / "ImageNet.sqfs").absolute()
    args.target = file
    values = replace(read_options(args), layout=layouts[0], target_dir=file)
    if in_place and not args.yes:
        _confirm()
    reporter = make_reporter(args.progress, sys.stderr)

    def leave(code: int, why: str) -> None:
        streams.say(f"imagenet_unpack: {why}")
        os._exit(code)

    cancel = Cancel(leave)
    with taken_signals(cancel):
        try:
            executor = options.make_executor(values, reporter)
            summary = _make(values, args.method, layouts, executor, reporter, cancel)
        finally:
            reporter.close()
    for line in output.run_lines(summary.run):
        streams.say(f"imagenet_unpack: {line}")
    code = summary.run.exit_code
    if args.progress in ("auto", "bar", "log"):
        verdict = "done" if code == ExitCode.OK else "ended"
        elapsed = human_time(time.monotonic() - args.began_s)
        streams.say(f"{verdict} in {elapsed} with {executor.workers} workers: {output.standing(summary.run)}")
        for made in summary.images:
            for line in mount_lines(made):
                streams.say(line)
    if args.json and code != ExitCode.DEFECT:
        members = output.run_object(summary.run)
        images = [str(made) for made in summary.images]
        text = output.json_object(args, workers=executor.workers, method=summary.method, images=images, **members)
        streams.emit(text, code=code)
    return code


def _make(
    values: options.UnpackOptions,
    method: image.ChosenMethod,
    layouts: tuple[Layout, ...],
    executor: Executor,
    reporter: Reporter,
    cancel: Cancel,
) -> image.ImageSummary:
    try:
        found = options.inputs(values, cancel.check)
    except CancelledError:
        message = "stopped before anything was begun: run the command again"
        run = RunSummary(exit_code=cancel.exit_code, splits={}, message=message)
        return image.ImageSummary(run=run, method=None, images=())
    return image.make_images(
        image.Options(
            output=values.target,
            planners=found.planners,
            classes=found.classes,
            verify=lambda plan: options.verify(values, plan, reporter, cancel.check),
            method=method,
            layouts=layouts,
            restart=values.restart,
            limits=options.limits(values),
            force=values.force,
        ),
        executor,
        reporter,
        cancel,
    )


def mount_lines(file: Path) -> list[str]:
    """Say how to mount an image."""
    shown = shlex.quote(str(file))
    return [
        f"{file}: mount it read-only with one of",
        f"  mount -o loop,ro {shown} /mnt/imagenet",
        f"  squashfuse {shown} DIR          (without root; unmount with `fusermount -u DIR`)",
        f"  apptainer exec --bind {shown}:/data:image-src=/ CONTAINER COMMAND",
    ]


def _confirm() -> None:
    """Ask on a terminal whether archives may be changed.

    Raises:
        UsageError: the answer is no, or there is nobody to ask.
    """
    question = "the archives become images themselves; `restore` brings them back bit by bit"
    if not (sys.stdin and sys.stdin.isatty()):
        raise UsageError(f"--method in-place needs --yes where nobody can be asked: {question}")
    streams.say(f"{question}. Continue? [y/N] ")
    answer = ""
    with contextlib.suppress(OSError):
        answer = sys.stdin.readline()
    if answer.strip().lower() not in ("y", "yes"):
        raise UsageError("nothing was changed")
