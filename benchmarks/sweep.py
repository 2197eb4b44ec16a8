"""Sweep workers and window sizes on a storage: throughput, files/s, CPU; a recommendation, CSV, JSON and a plot.

    python benchmarks/sweep.py --base-dir /archives --target /scratch/me --budget 2m --sample 5G
    python benchmarks/sweep.py --base-dir /archives --fs ext4 --scratch /var/tmp    # root: fresh file systems

`python -m imagenet_unpack tune` is the same for workers alone, without a checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import itertools
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import _lib

from imagenet_unpack.cli.values import seconds, size_bytes
from imagenet_unpack.dataset import ilsvrc2012
from imagenet_unpack.planning.train import plan_train
from imagenet_unpack.run import tune


def main() -> int:
    options = parse_arguments()
    _lib.stop_on_sigterm()
    archive = options.base_dir / ilsvrc2012.TRAIN_ARCHIVE_NAME
    plan = plan_train(archive, None, None, "wnid")
    grid = list(itertools.product(options.workers, options.windows))
    random.Random(0).shuffle(grid)  # so that a machine that grows slower does not look like a trend
    each_bytes = options.sample // len(grid)
    began_s = time.monotonic()
    trials: list[tune.Trial] = []
    report: dict[str, object] = {"schema": 1, "benchmark": "sweep", **_lib.facts()}
    with contextlib.ExitStack() as undo:
        scratch = options.target or Path(undo.enter_context(tempfile.TemporaryDirectory(dir=options.scratch)))
        report["target"] = {"file_system": options.fs, "on": _lib.file_system_of(scratch)}
        for number, (workers, window) in enumerate(grid):
            if trials and time.monotonic() - began_s > options.budget * number / (number + 1):
                print(f"the budget is used up: {len(grid) - number} of {len(grid)} combinations are left out")
                break
            with _lib.fresh_place(options.fs, scratch, 4 * each_bytes + (4 << 30)) as place:
                report["cache"] = _lib.prepare_cache(archive, warm=False)
                found = tune.run_trials(
                    plan, place, (workers,), sample_bytes=each_bytes, budget_s=options.budget, window_bytes=window
                )
                trials += found
                if options.fs == "folder":
                    place.rmdir()  # the trial has left nothing in it
            trial = trials[-1]
            rates = f"{trial.bytes_per_s / 1e6:8.0f} MB/s{trial.images / trial.elapsed_s:9.0f} images/s"
            print(f"{workers:3} workers {window >> 10:6} KiB {rates} {trial.cpu_s:6.2f} CPU s", flush=True)
            write(options.out, {**report, "trials": [dataclasses.asdict(each) for each in trials]})
    advice, best = tune.recommend(trials)
    slowest = min(trials, key=lambda each: each.bytes_per_s)
    print(
        f"use --workers {advice.workers}: within {1 - advice.bytes_per_s / best.bytes_per_s:.0%} of the "
        f"best ({best.workers} workers, {best.window_bytes >> 10} KiB), {advice.bytes_per_s / slowest.bytes_per_s:.1f} "
        f"times the slowest ({slowest.workers} workers, {slowest.window_bytes >> 10} KiB)"
    )
    print(f"raw figures: {options.out}.json and .csv; a plot: python benchmarks/plot.py {options.out}.json")
    return 0


def write(out: Path, report: dict[str, object]) -> None:
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    trials = report["trials"]
    assert isinstance(trials, list)
    with out.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(trials[0]))
        writer.writeheader()
        writer.writerows(trials)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base-dir", type=Path, required=True, metavar="DIR", help=f"folder with {ilsvrc2012.TRAIN_ARCHIVE_NAME}")
    add("--target", type=Path, metavar="DIR", help="an existing folder on the storage to be tried")
    add("--fs", choices=_lib.FILE_SYSTEMS, default="folder", help="fresh file systems instead (root) (%(default)s)")
    add("--scratch", type=Path, default=Path("/var/tmp"), metavar="DIR", help="where their images go (%(default)s)")
    add("--workers", type=lambda text: tuple(map(int, text.split(","))), default=(1, 2, 4, 8, 16), metavar="A,B,...")
    add("--windows", type=lambda text: tuple(map(size_bytes, text.split(","))), default=(1 << 20, 8 << 20),
        metavar="A,B,...", help="bytes read at once, at most 8M (1M,8M)")  # fmt: skip
    add("--sample", type=size_bytes, default=size_bytes("5G"), metavar="BYTES", help="in all trials together (5G)")
    add("--budget", type=seconds, default=seconds("5m"), metavar="TIME", help="such as 90s, 2m (5m)")
    add("--out", type=Path, default=Path("sweep"), metavar="FILE", help="name of the results (%(default)s)")
    options = parser.parse_args()
    if (options.target is None) == (options.fs == "folder"):
        parser.error("give --target DIR, or --fs with --scratch")
    return options


if __name__ == "__main__":
    sys.exit(main())
