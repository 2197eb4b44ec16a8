"""`check` and `check --deep` against `find | wc -l`, `ls -f`, `xxhsum -c` and `md5sum -c` on one published tree.

python benchmarks/check.py TARGET --repeats 3 [--cold]      # --cold needs root; empty_tree.py makes a TARGET
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import _lib


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cold", action="store_true", help="drop the caches before each run")
    parser.add_argument("--names-only", action="store_true", help="leave out what reads every byte")
    parser.add_argument("--out", type=Path, default=Path("check.json"), metavar="FILE")
    options = parser.parse_args()
    target: Path = options.target.resolve()
    with tempfile.TemporaryDirectory() as name:
        commands = candidates(target, options.workers, Path(name), names_only=options.names_only)
        runs: dict[str, list[float]] = {each: [] for each in commands}
        for turn in range(options.repeats):
            for each, command in commands.items():
                if options.cold:
                    subprocess.run(["sync"], check=True)
                    Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
                elif turn == 0:
                    subprocess.run(["find", target, "-type", "f"], stdout=subprocess.DEVNULL, check=True)
                usage = _lib.measure(command, Path(name), cwd=target)
                if usage.error:
                    raise SystemExit(f"{each}: {usage.error}")
                runs[each].append(usage.elapsed_s)
    base = statistics.median(runs["find"])
    for each, times in runs.items():
        print(f"{each:14}{statistics.median(times):8.2f} s  x find {statistics.median(times) / base:6.2f}  {times}")
    report = {"schema": 1, "benchmark": "check", **_lib.facts(), "cold": options.cold, "runs": runs}
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def candidates(target: Path, workers: int, folder: Path, *, names_only: bool) -> dict[str, list[str]]:
    """Return the commands; those that read bytes get their list of digests first, outside the time."""
    check = [sys.executable, "-m", "imagenet_unpack", "check", str(target), "--workers", str(workers)]
    found = {
        "find": ["bash", "-c", f"find '{target}' -type f | wc -l"],
        "ls": ["bash", "-c", f"ls -fR '{target}' | wc -l"],
        "check": check,
    }
    if names_only:
        return found
    found["check --deep"] = [*check, "--deep"]
    for tool, name in (("xxhsum", "-H3"), ("md5sum", "")):
        if shutil.which(tool):
            sums = folder / tool
            with sums.open("wb") as file:
                script = f"find train val -type f -print0 2>/dev/null | xargs -0 {tool} {name}"
                subprocess.run(["bash", "-c", script], cwd=target, stdout=file, check=False)
            found[f"{tool} -c"] = [tool, "--quiet", "-c", str(sums)]
    return found


if __name__ == "__main__":
    sys.exit(main())
