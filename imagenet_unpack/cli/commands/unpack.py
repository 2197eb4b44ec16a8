"""`unpack`: plan, extract, check, publish."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from dataclasses import fields, replace

from imagenet_unpack import options
from imagenet_unpack.cli import batch, output, streams
from imagenet_unpack.cli.progress import make_reporter
from imagenet_unpack.cli.signals import taken_signals
from imagenet_unpack.errors import ExitCode
from imagenet_unpack.options import UnpackOptions
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.text import counted, human_time


def read_options(args: argparse.Namespace) -> UnpackOptions:
    """Return the options that the command line gives; the others keep their defaults.

    Raises:
        UsageError: `--part auto`, and the batch system does not say which part.
    """
    given = {field.name: getattr(args, field.name) for field in fields(UnpackOptions) if hasattr(args, field.name)}
    if given.get("part") == "auto":
        given["part"] = part = batch.part_of(os.environ)
        streams.say(f"imagenet_unpack: part {part.index}/{part.count}, from {part.source}")
    return UnpackOptions(**given)


def _confirmed() -> bool:
    """Ask on a terminal whether the archives may be destroyed; elsewhere nobody is there to say so."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    streams.say("--consume frees the archives' bytes as they are extracted: afterwards they cannot be used again.")
    streams.say("Type yes to go on:")
    return sys.stdin.readline().strip().lower() == "yes"


def run(args: argparse.Namespace) -> int:
    """Run the job; a summary goes to stderr, the JSON object to stdout."""
    values = read_options(args)
    if values.consume and not values.yes:
        values = replace(values, yes=_confirmed())
    reporter = make_reporter(args.progress, sys.stderr)

    def leave(code: int, why: str) -> None:
        streams.say(f"imagenet_unpack: {why}")
        if args.json:
            with contextlib.suppress(streams.OutputError):
                status = "incomplete" if code == ExitCode.STOPPED else "interrupted"
                streams.emit(output.json_object(args, status=status, exit_code=code))
        os._exit(code)

    cancel = Cancel(leave)
    with taken_signals(cancel):
        try:
            executor = options.make_executor(values, reporter)
            summary = options.run(values, executor, reporter, cancel)
        finally:
            reporter.close()
    for line in output.run_lines(summary):
        streams.say(f"imagenet_unpack: {line}")
    if args.progress in ("auto", "bar", "log"):
        if summary.exit_code == ExitCode.OK and values.layout == "index" and not output.nothing_done(summary):
            streams.say(output.LAYOUT_NOTE)
        verdict = "done" if summary.exit_code == ExitCode.OK else "ended"
        elapsed = human_time(time.monotonic() - args.began_s)
        workers = counted(executor.workers, "worker")
        streams.say(f"{verdict} in {elapsed} with {workers}: {values.target}: {output.standing(summary)}")
    if args.json and summary.exit_code != ExitCode.DEFECT:
        text = output.json_object(args, workers=executor.workers, **output.run_object(summary))
        streams.emit(text, code=summary.exit_code)
    return summary.exit_code
