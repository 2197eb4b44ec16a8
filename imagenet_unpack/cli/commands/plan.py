"""`plan`: what `unpack` would do."""

from __future__ import annotations

import argparse
import os
import sys

from imagenet_unpack import api
from imagenet_unpack.cli import output, streams
from imagenet_unpack.cli.commands.unpack import read_options
from imagenet_unpack.cli.progress import make_reporter
from imagenet_unpack.errors import ExitCode
from imagenet_unpack.host import resources


def run(args: argparse.Namespace) -> int:
    """Print the plan as a table or a JSON object."""
    options = read_options(args)
    result = api.plan_options(options, make_reporter(args.progress, sys.stderr))
    if args.json:
        here = {
            "cpus": resources.usable_cpus(os.environ),
            "memory_available": resources.memory().available,
        }
        found = output.plan_object(result.splits, result.room)
        streams.emit(output.json_object(args, layout=options.layout, host=here, **found))
        return ExitCode.OK
    for line in output.plan_lines(result.splits, str(result.target), result.room):
        streams.emit(line)
    for note in (note for plan in result.splits.values() for note in plan.notes):
        streams.say(f"note: {note}")
    if result.room.fault is not None:
        streams.say(f"note: {result.room.fault}")
    return ExitCode.OK
