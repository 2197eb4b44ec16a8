"""The report's charts as numbers and SVG path data; the template draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from imagenet_unpack.cli.report.contents import ClassContents, LastRun

WIDTH, HEIGHT = 960, 160
_BARS = 100  # up to this many classes are drawn as bars with gaps; more as one outline
_MIN_STEP_S = 0.2  # shorter steps would make peaks of single images


@dataclass(frozen=True, slots=True, kw_only=True)
class CountChart:
    """Images of each class of a split against the published counts.

    Attributes:
        bars: path of the counts.
        short: path of those bars that are not as high as published.
        published: path of the published counts, a line.
        ticks: places on the x axis, and the class index there.
        top: number of images at the upper end of the y axis.
        different: the classes that do not have as many images as published.
    """

    split: str
    bars: str
    short: str
    published: str
    ticks: tuple[tuple[float, int], ...]
    top: int
    classes: int
    images: int
    different: tuple[tuple[ClassContents, int, int], ...]


def count_chart(split: str, classes: Sequence[ClassContents]) -> CountChart | None:
    """Return the chart of a split, or None if no class of it is there."""
    shown = [entry for entry in classes if split in entry.images]
    if not shown:
        return None
    counts = [entry.images[split] for entry in shown]
    published = [entry.published(split) or count for entry, count in zip(shown, counts, strict=True)]
    top = max(*counts, *published, 1)
    step = WIDTH / len(shown)
    gap = step * 0.15 if len(shown) <= _BARS else 0
    edges = [(step * place + gap, step * (place + 1) - gap) for place in range(len(shown))]

    def height(count: int) -> float:
        return HEIGHT - HEIGHT * count / top

    def bar(place: int) -> str:
        left, right = edges[place]
        return f"M{left:.1f} {HEIGHT}V{height(counts[place]):.1f}H{right:.1f}V{HEIGHT}"

    line = "".join(
        f"{'L' if place else 'M'}{step * place:.1f} {height(count):.1f}H{step * (place + 1):.1f}"
        for place, count in enumerate(published)
    )
    different = [place for place in range(len(shown)) if counts[place] != published[place]]
    every = max(1, len(shown) // 10)
    return CountChart(
        split=split,
        bars="".join(map(bar, range(len(shown)))),
        short="".join(map(bar, different)) if len(different) < len(shown) else "",
        published=line,
        ticks=tuple((step * (place + 0.5), shown[place].index) for place in range(0, len(shown), every)),
        top=top,
        classes=len(shown),
        images=sum(counts),
        different=tuple((shown[place], counts[place], published[place]) for place in different),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RateChart:
    """A rate over time.

    Attributes:
        line: path of the rate.
        top: rate at the upper end of the y axis.
        mean: over the whole run.
    """

    line: str
    top: float
    mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCharts:
    """The last run over time.

    Attributes:
        images: images a second.
        megabytes: megabytes a second.
        waits: places and widths of the stretches in which work waited.
        waited_s: by what was waited for, seconds.
        span_s: length of the x axis, seconds.
    """

    images: RateChart
    megabytes: RateChart
    waits: tuple[tuple[float, float], ...]
    waited_s: tuple[tuple[str, float], ...]
    span_s: float
    image_count: int
    size_bytes: int


def run_charts(run: LastRun) -> RunCharts | None:
    """Return the charts of a run, or None if it was too short for any."""
    points = list(run.points)
    # What comes behind the last image is the check and the publishing.
    while len(points) > 2 and points[-1][1:3] == points[-2][1:3] and not points[-2][3]:
        points.pop()
    if len(points) < 2 or points[-1][0] <= points[0][0]:
        return None
    origin = points[0][0]
    span = points[-1][0] - origin
    waits = [(before[0] - origin, after[0] - before[0], before[3]) for before, after in pairwise(points) if before[3]]
    waited: dict[str, float] = {}
    for _, length, reason in waits:
        waited[reason] = waited.get(reason, 0.0) + length
    scale = WIDTH / span
    return RunCharts(
        images=_rate_chart([(at - origin, float(images)) for at, images, _, _ in points], span),
        megabytes=_rate_chart([(at - origin, size / 1e6) for at, _, size, _ in points], span),
        waits=tuple((start * scale, length * scale) for start, length, _ in waits),
        waited_s=tuple(sorted(waited.items())),
        span_s=span,
        image_count=points[-1][1],
        size_bytes=points[-1][2],
    )


def _rate_chart(totals: Sequence[tuple[float, float]], span: float) -> RateChart:
    steps = [totals[0]]
    for point in totals[1:]:
        if point[0] - steps[-1][0] >= min(_MIN_STEP_S, span):
            steps.append(point)
    rates = [
        (before[0], after[0], max(0.0, after[1] - before[1]) / (after[0] - before[0]))
        for before, after in pairwise(steps)
    ]
    top = max((rate for _, _, rate in rates), default=0) or 1
    line = "".join(
        f"{'L' if place else 'M'}{start / span * WIDTH:.1f} {HEIGHT - rate / top * HEIGHT:.1f}H{end / span * WIDTH:.1f}"
        for place, (start, end, rate) in enumerate(rates)
    )
    return RateChart(line=line, top=top, mean=(totals[-1][1] - totals[0][1]) / span)
