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
from imagenet_unpack.text import printable


def run(args: argparse.Namespace) -> int:
    """Print the plan as a table or a JSON object; 5 if the target has no room for it."""
    options = read_options(args)
    result = api.plan_options(options, make_reporter(args.progress, sys.stderr))
    code = ExitCode.OK if result.fits or options.force else ExitCode.CANNOT_START
    if args.json:
        here = {"cpus": resources.usable_cpus(os.environ), "memory_available": resources.memory().available}
        status = {"status": "ok" if code == ExitCode.OK else "failed", "exit_code": int(code)}
        text = output.json_object(args, layout=options.layout, host=here, **status, **output.plan_object(result))
        streams.emit(text, code=code)
    else:
        for line in output.plan_lines(result):
            streams.emit(printable(line), code=code)
    if args.progress != "none":
        for note in (note for split in result.splits.values() for note in split.notes):
            streams.say(f"note: {note}")
        if options.layout == "index":
            streams.say(output.LAYOUT_NOTE)
    if result.room.fault is not None:
        streams.say(f"imagenet_unpack: {result.room.fault}")
    return code
