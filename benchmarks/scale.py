"""How time and memory grow with the data: 10 to 1000 classes at their real counts, bodies as holes, on btrfs with zstd.

    python benchmarks/scale.py --scratch /var/tmp --classes 10,100,300,1000     # as root; a few GB of real disk

Counts, not throughput: plan, unpack, check and repeat, each a process of its own. Results go to scale.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import _lib

STEPS = ("plan", "unpack", "repeat", "check")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp"), metavar="DIR")
    parser.add_argument("--classes", type=lambda text: [int(each) for each in text.split(",")], default=[10, 100, 300])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("scale.json"), metavar="FILE")
    options = parser.parse_args()
    _lib.stop_on_sigterm()
    rows = []
    with tempfile.TemporaryDirectory(prefix="scale-", dir=options.scratch) as name:
        for classes in options.classes:
            rows.append(row(Path(name), classes, options.workers))
            print(" ".join(f"{key} {value}" for key, value in rows[-1].items() if not isinstance(value, dict)))
            for step in STEPS:
                usage = rows[-1][step]
                assert isinstance(usage, dict)
                memory = usage["peak_process_bytes"] / 1e6
                print(f"  {step:8}{usage['elapsed_s']:9.2f} s {memory:7.0f} MB largest process", flush=True)
            report = {"schema": 1, "benchmark": "scale", **_lib.facts(), "workers": options.workers, "rows": rows}
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def row(scratch: Path, classes: int, workers: int) -> dict[str, object]:
    """Make archives of so many classes and run every step on them."""
    base = scratch / f"archives-{classes}"
    program = [sys.executable, "-m", "imagenet_unpack"]
    shape = ["--classes", str(classes), "--real-counts", "--val-images", str(50 * classes), "--bodies", "holes"]
    _lib.call(*program, "synth", str(base), *shape)
    found: dict[str, object] = {"classes": classes}
    with _lib.fresh_place("btrfs", scratch, 400 << 30) as place:
        _lib.call("mount", "-o", "remount,compress=zstd", str(place))
        target = place / "t"
        source = ["--base-dir", str(base), "--target-dir", str(target)]
        run = [*program, *source, "--workers", str(workers), "--progress", "none"]
        check = [*program, "check", str(target), "--workers", str(workers)]
        for step, command in zip(STEPS, ([*program, "plan", *source], run, run, check), strict=True):
            if step in ("plan", "unpack"):
                _lib.prepare_cache(base / "ILSVRC2012_img_train.tar", warm=False)
            usage = _lib.measure(command, place, cwd=scratch)
            if usage.error:
                raise SystemExit(f"{step}: {usage.error}")
            found[step] = dataclasses.asdict(usage)
        found["files"] = sum(1 for path in target.rglob("*.JPEG"))
    return found


if __name__ == "__main__":
    sys.exit(main())
