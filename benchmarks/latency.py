"""Throughput against the number of workers on a target that waits: small images, so that metadata is what counts.

    python benchmarks/latency.py --target /mnt/delayed --workers 1,4,16,32

The target is any mounted file system with a delay: a network file system, or a FUSE pass-through that sleeps in each
operation. Rates are of the extraction between a tenth and nine tenths of its images, so the start of the pool does not
count. Results go to latency.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _lib


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, metavar="DIR")
    parser.add_argument("--workers", type=lambda text: [int(each) for each in text.split(",")], default=[1, 4, 16, 32])
    parser.add_argument("--images", type=int, default=1300, metavar="N", help="a class, of 96 classes (%(default)s)")
    parser.add_argument("--mean-bytes", type=int, default=2000, metavar="N", help="mean size (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("latency.json"), metavar="FILE")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        shape = ["--classes", "96", "--images", str(options.images), "--mean-bytes", str(options.mean_bytes)]
        _lib.call(sys.executable, "-m", "imagenet_unpack", "synth", name, *shape, "--val-images", "0")
        for workers in options.workers:
            rows.append({"workers": workers, "images_per_s": rate(Path(name), options.target, workers)})
            print(f"{workers:3} workers {rows[-1]['images_per_s']:9.0f} images/s", flush=True)
    slowest = min(rows, key=lambda row: row["workers"])["images_per_s"]
    print(", ".join(f"{row['workers']}: x{row['images_per_s'] / slowest:.1f}" for row in rows))
    report = {"schema": 1, "benchmark": "latency", **_lib.facts(), "rows": rows}
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def rate(base: Path, target: Path, workers: int) -> float:
    """Return images a second; few workers get fewer classes, or they would take all day."""
    place = Path(tempfile.mkdtemp(dir=target))
    last = min(95, max(8, 3 * workers) - 1)
    command = [sys.executable, "-m", "imagenet_unpack", "--base-dir", str(base), "--target-dir", str(place / "t")]
    command += ["--workers", str(workers), "--classes", f"0-{last}", "--progress", "json"]
    points = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            event = json.loads(line) if line.startswith("{") else {}
            if event.get("event") == "progress" and event["phase"] == "extracting":
                points.append((time.monotonic(), event["images"]))
    shutil.rmtree(place)
    if process.returncode:
        raise SystemExit(f"{workers} workers: exit {process.returncode}")
    total = points[-1][1]
    inner = [point for point in points if 0.1 * total <= point[1] <= 0.9 * total]
    return float((inner[-1][1] - inner[0][1]) / (inner[-1][0] - inner[0][0]))


if __name__ == "__main__":
    sys.exit(main())
