"""Draw the JSON of peers, sweep, scale, latency or image as SVG and PNG beside it.

    python benchmarks/plot.py peers.json ...

Needs the extra [plot]. Colours are legible on a light and on a dark page; the background is transparent.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

GREY, BLUE, ORANGE, GREEN = "#808890", "#3b82c4", "#d97b29", "#3f9a5a"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="JSON")
    options = parser.parse_args()
    try:
        import matplotlib as mpl
    except ImportError:
        raise SystemExit("plots need matplotlib: pip install -e '.[plot]'") from None
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), GREY
    )
    plt.rcParams.update({**style, "font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    for path in options.files:
        report = json.loads(path.read_text(encoding="utf-8"))
        figure, axes = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
        DRAW[report["benchmark"]](axes, report)
        for ending in (".svg", ".png"):
            figure.savefig(path.with_suffix(ending), transparent=True, dpi=160)
            print(path.with_suffix(ending))
        plt.close(figure)
    return 0


def peers(axes: Any, report: dict[str, Any]) -> None:
    """Bars of MB/s, fastest on top; the direct copy as a line."""
    size = report["images"]["size_bytes"] / 1e6
    limits = {"dd", "cp"}
    rows = sorted(
        (row for row in report["summary"] if row["candidate"] not in limits), key=lambda row: -row["elapsed_s"]
    )
    names = [row["candidate"] for row in rows]
    colours = [BLUE if name == "ours" else GREY for name in names]
    low = [size / row["elapsed_s"] - size / row["slowest_s"] for row in rows]
    high = [size / row["fastest_s"] - size / row["elapsed_s"] for row in rows]
    bars = axes.barh(names, [size / row["elapsed_s"] for row in rows], color=colours, xerr=(low, high), ecolor=ORANGE)
    axes.bar_label(bars, labels=[f"{row['ratio']:.2f}x the time" for row in rows], padding=14, color=GREY, fontsize=9)
    for row in report["summary"]:
        if row["candidate"] == "dd":
            axes.axvline(size / row["elapsed_s"], color=ORANGE, linestyle="--", label="dd, direct copy of the archive")
            axes.legend(loc="lower right", frameon=False)
    axes.set_xlabel("MB/s of images, flush included (bars: median, whiskers: range)")
    axes.margins(x=0.25)


def sweep(axes: Any, report: dict[str, Any]) -> None:
    """Throughput by workers, a line for each window size."""
    windows = sorted({trial["window_bytes"] for trial in report["trials"]})
    for window, colour in zip(windows, (BLUE, ORANGE, GREEN, GREY), strict=False):
        trials = sorted((t for t in report["trials"] if t["window_bytes"] == window), key=lambda t: t["workers"])
        rates = [trial["size_bytes"] / trial["elapsed_s"] / 1e6 for trial in trials]
        workers = [trial["workers"] for trial in trials]
        axes.plot(workers, rates, "o-", color=colour, label=f"windows of {window >> 10} KiB")
    axes.set_xlabel("workers")
    axes.set_ylabel("MB/s, flush included")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def scale(axes: Any, report: dict[str, Any]) -> None:
    """Seconds by images, a line for each step."""
    for step, colour in zip(("unpack", "repeat", "check", "plan"), (BLUE, ORANGE, GREEN, GREY), strict=True):
        axes.plot(
            [row["files"] for row in report["rows"]],
            [row[step]["elapsed_s"] for row in report["rows"]],
            "o-",
            color=colour,
            label=step,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("images")
    axes.set_ylabel("seconds")
    axes.legend(frameon=False)


def latency(axes: Any, report: dict[str, Any]) -> None:
    """Images a second by workers, with the line of proportion."""
    rows = sorted(report["rows"], key=lambda row: row["workers"])
    workers, rates = [row["workers"] for row in rows], [row["images_per_s"] for row in rows]
    axes.plot(workers, rates, "o-", color=BLUE, label="measured")
    proportional = [rates[0] / workers[0] * each for each in workers]
    axes.plot(workers, proportional, "--", color=GREY, label="in proportion to the workers")
    axes.set_xlabel("workers")
    axes.set_ylabel("images/s")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def image_make(axes: Any, report: dict[str, Any]) -> None:
    """Bars of seconds, the quickest way on top."""
    _bars(axes, report["rows"], "elapsed_s", fastest_first=True)
    axes.set_xlabel("seconds, flush included (bars: median, whiskers: range)")


def image_read(axes: Any, report: dict[str, Any]) -> None:
    """Bars of images/s, cold and warm."""
    rows = [{**row, "candidate": f"{row['candidate']} ({row['cache']})"} for row in report["rows"]]
    _bars(axes, rows, "images_per_s", fastest_first=False)
    axes.set_xlabel(f"images/s, {rows[0]['readers']} readers (bars: median, whiskers: range)")


def _bars(axes: Any, rows: list[dict[str, Any]], key: str, *, fastest_first: bool) -> None:
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["candidate"], []).append(row[key])
    names = sorted(values, key=lambda name: median(values[name]), reverse=fastest_first)
    middle = [median(values[name]) for name in names]
    low = [median(values[name]) - min(values[name]) for name in names]
    high = [max(values[name]) - median(values[name]) for name in names]
    colours = [BLUE if name.startswith(("image ", "our ")) else GREY for name in names]
    axes.barh(names, middle, color=colours, xerr=(low, high), ecolor=ORANGE)


DRAW = {
    "peers": peers,
    "sweep": sweep,
    "scale": scale,
    "latency": latency,
    "image-make": image_make,
    "image-read": image_read,
}

if __name__ == "__main__":
    sys.exit(main())
