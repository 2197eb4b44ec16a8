"""The report as HTML: contents, charts and thumbnails put into the template."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2

from imagenet_unpack import __version__
from imagenet_unpack.cli.report import charts, contents, thumbnails
from imagenet_unpack.cli.report.contents import ClassContents
from imagenet_unpack.errors import TargetError
from imagenet_unpack.model import SplitCheck, SplitName
from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.text import human_bytes, human_time

GENERATOR = "imagenet_unpack report"
_SHOWN_PROBLEMS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What is shown.

    Attributes:
        target: the folder.
        checks: what a check found, by split.
        classes: the classes, each with the images to show.
        uris: thumbnails as data URIs, by path.
        run: the last run, or None.
    """

    target: Path
    checks: Mapping[SplitName, SplitCheck]
    classes: list[ClassContents]
    uris: Mapping[str, str]
    run: contents.LastRun | None


def render(report: Report) -> str:
    """Return the page: one file without any reference to another."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("imagenet_unpack.cli.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": human_bytes,
        "time": human_time,
        "number": "{:,}".format,
        "rate": _rate,
        "problem": contents.problem_text,
    }
    counts = [charts.count_chart(split, report.classes) for split in contents.LABELLED_SPLITS]
    return environment.get_template("report.html").render(
        generator=GENERATOR,
        version=__version__,
        now=dt.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        report=report,
        splits=contents.LABELLED_SPLITS,
        counts=[chart for chart in counts if chart is not None],
        run=report.run,
        run_began=_moment(report.run.began_s) if report.run else "",
        run_charts=charts.run_charts(report.run) if report.run else None,
        shown_problems=_SHOWN_PROBLEMS,
        width=charts.WIDTH,
        height=charts.HEIGHT,
        thumbnail_size=thumbnails.SIZE,
    )


def _moment(seconds: float) -> str:
    return dt.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z")


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def write(path: Path, page: str) -> None:
    """Write the page atomically; it replaces an earlier report, and nothing else.

    Raises:
        TargetError: there is something else under that name, or the page cannot be written.
    """
    try:
        if path.exists() and not _is_report(path):
            raise TargetError(f"{path} exists and is not a report of this program: choose another --output")
        Disk(durable=False).write_file(path, page.encode(), sync=False)
    except OSError as error:
        raise TargetError(f"{path}: cannot be written: {error.strerror}: choose another --output") from error


def _is_report(path: Path) -> bool:
    with open(path, "rb") as file:
        return f'content="{GENERATOR}'.encode() in file.read(1000)
