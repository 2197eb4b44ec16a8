"""`report`: a page that shows what is in a target."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from imagenet_unpack.checking import checker
from imagenet_unpack.cli import output, streams
from imagenet_unpack.cli.progress import make_reporter
from imagenet_unpack.cli.report import contents
from imagenet_unpack.errors import ExitCode, TargetError, UsageError
from imagenet_unpack.host import resources


def run(args: argparse.Namespace) -> int:
    """Check the tree, choose images of each class, and write the page."""
    if find_spec("jinja2") is None or find_spec("PIL") is None:
        raise UsageError("report needs Jinja2 and Pillow: pip install 'imagenet_unpack[report]'")
    from imagenet_unpack.cli.report import page, thumbnails  # noqa: PLC0415 - they import what the extra brings

    target: Path = args.target
    if target.is_file():
        raise TargetError(f"{target}: report reads folders: mount the image and give the mount point")
    workers = resources.worker_count(args.workers)
    reporter = make_reporter(args.progress, sys.stderr)
    try:
        checks = checker.check_target(target, depth="names", workers=workers, reporter=reporter)
        classes = contents.class_contents(target, checks, args.images)
        pictures = [picture.path for entry in classes for each in entry.pictures.values() for picture in each]
        reporter.phase("making thumbnails", None, len(pictures))
        uris: dict[str, str] = {}
        for batch in thumbnails.thumbnails(pictures, workers):
            uris |= batch
            reporter.advance(nbytes=0, images=len(batch), shards=0)
    finally:
        reporter.close()
    report = page.Report(
        target=target.absolute(),
        checks={check.split: check for check in checks},
        classes=classes,
        uris=uris,
        run=contents.last_run(target),
    )
    page.write(args.output, page.render(report))
    if args.json:
        members = {"output": str(args.output.absolute()), "splits": output.check_object(checks)}
        streams.emit(output.json_object(args, **members))
        return ExitCode.OK
    for check in checks:
        verdict = f"{len(check.problems):,} differences" if check.problems else "whole"
        streams.emit(f"{check.split}: {verdict}, {check.images:,} images of {check.classes:,} classes")
    streams.emit(f"wrote {args.output}")
    return ExitCode.OK
