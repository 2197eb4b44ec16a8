"""`check`: whether a tree is whole."""

from __future__ import annotations

import argparse
import sys

from imagenet_unpack.checking.entry import check_path
from imagenet_unpack.cli import output, streams
from imagenet_unpack.cli.progress import make_reporter
from imagenet_unpack.errors import ExitCode


def run(args: argparse.Namespace) -> int:
    """Print what the check found."""
    reporter = make_reporter(args.progress, sys.stderr)
    try:
        found = check_path(args.target, deep=args.deep, contents=args.contents, workers=args.workers, reporter=reporter)
    finally:
        reporter.close()
    code = ExitCode.CHECK_DIFFERS if any(each.problems for each in found) else ExitCode.OK
    if args.json:
        status = "differs" if code else "ok"
        members = {"status": status, "exit_code": int(code), "splits": output.check_object(found)}
        streams.emit(output.json_object(args, **members), code=code)
        return code
    for line in output.check_lines(found, deep=args.deep):
        streams.emit(line, code=code)
    return code
