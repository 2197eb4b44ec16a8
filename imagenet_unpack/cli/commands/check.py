"""`check`: whether a tree is whole."""

from __future__ import annotations

import argparse
import sys

from imagenet_unpack import api
from imagenet_unpack.cli import output, streams
from imagenet_unpack.cli.progress import make_reporter
from imagenet_unpack.errors import ExitCode


def run(args: argparse.Namespace) -> int:
    """Print what the check found."""
    reporter = make_reporter(args.progress, sys.stderr)
    result = api.check(args.target, deep=args.deep, contents=args.contents, workers=args.workers, progress=reporter)
    code = ExitCode.OK if result.ok else ExitCode.CHECK_DIFFERS
    found = tuple(result.splits.values())
    if args.json:
        status = "ok" if result.ok else "differs"
        members = {"status": status, "exit_code": int(code), "splits": output.check_object(found)}
        streams.emit(output.json_object(args, **members), code=code)
        return code
    for line in output.check_lines(found, deep=args.deep):
        streams.emit(line, code=code)
    return code
