"""Time until a job's nodes are ready to train, each with a copy on its own disk, while one archive server feeds all.

    python benchmarks/nodes.py --nodes 1,2,4      (as root, with Slurm, munge and bindfs)

Each node is a Slurm daemon of this machine with its own mount of the archives (so its own page cache) and its own fresh
ext4. The server is a FUSE mount with a rate that all nodes share and nothing cached. The job is the script of
docs/clusters.md; with `cp` its first step copies the archives to the node and unpacks them there with tar, with `tar`
it unpacks them from the server with tar, inner archives in parallel each time. Ready is when the last task of the
second step has started, counted from the job's first line. Results go to nodes.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import _lib

sys.path.insert(0, str(_lib.REPOSITORY / "tests"))
import passthrough
import slurm_cluster

CANDIDATES = ("imagenet_unpack", "cp", "tar")
# What stands for the training.
TRAIN = """
import os, time
with open(f"started{os.environ['SLURM_PROCID']}", "w") as file:
    file.write(str(time.time()))
"""
# The inner archives, one for each CPU at a time; val stays flat, which is less than what a training needs.
TAR = """
  set -euo pipefail
  if [ "$SLURM_LOCALID" != 0 ]; then exit; fi
  mkdir -p "$TMPDIR/ImageNet/train" "$TMPDIR/ImageNet/val"
  FETCH
  tar -xf "$from/ILSVRC2012_img_train.tar" -C "$TMPDIR/ImageNet/train"
  tar -xf "$from/ILSVRC2012_img_val.tar" -C "$TMPDIR/ImageNet/val"
  cd "$TMPDIR/ImageNet/train"
  ls | xargs -P "$SLURM_CPUS_ON_NODE" -I{} sh -c "mkdir {}.d && tar -xf {} -C {}.d && rm {}"
"""
FETCH = {"cp": 'from="$TMPDIR"; cp "$ARCHIVES"/*.tar "$TMPDIR"', "tar": 'from="$ARCHIVES"'}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=lambda text: [int(each) for each in text.split(",")], default=[1, 2, 4])
    parser.add_argument("--tasks", type=int, default=2, metavar="N", help="tasks on each node (%(default)s)")
    parser.add_argument("--rate", type=int, default=25, metavar="MB", help="MB/s of the server (%(default)s)")
    parser.add_argument("--classes", type=int, default=25, metavar="N", help="of 90 images of 110 KB (%(default)s)")
    parser.add_argument("--turns", type=int, default=3, metavar="N")
    parser.add_argument("--only", choices=CANDIDATES, action="append", help="leave the others out")
    parser.add_argument("--scratch", type=Path, default=None, metavar="DIR", help="where the nodes' disks are made")
    parser.add_argument("--out", type=Path, default=Path("nodes.json"), metavar="FILE")
    options = parser.parse_args()
    reason = slurm_cluster.missing()
    if reason is not None:
        parser.error(reason)
    rows = []
    with tempfile.TemporaryDirectory(prefix="nodes", dir=options.scratch) as name:
        base = Path(name) / "archives"
        shape = ["--classes", str(options.classes), "--images", "90", "--mean-bytes", "110000", "--val-images", "100"]
        _lib.call(sys.executable, "-m", "imagenet_unpack", "synth", str(base), *shape)
        size = sum(path.stat().st_size for path in base.glob("*.tar"))
        for _ in range(options.turns):
            for count in options.nodes:
                for candidate in options.only or CANDIDATES:
                    with cluster(Path(name), base, options.rate, count, size) as slurm:
                        ready_s, files = run(slurm, candidate, options.tasks)
                    read_s = count * size / options.rate / 1e6
                    row = {"candidate": candidate, "nodes": count, "ready_s": ready_s, "read_s": read_s, "files": files}
                    rows.append({**row, "load": os.getloadavg()[0]})
                    print(f"{candidate:16} {count} nodes {ready_s:6.1f} s (the server alone {read_s:.1f} s), {files} "
                          f"files a node, load {os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip
    for count in options.nodes:
        times = {
            each: [row["ready_s"] for row in rows if (row["candidate"], row["nodes"]) == (each, count)]
            for each in options.only or CANDIDATES
        }
        print(count, "nodes:", ", ".join(f"{each} {statistics.median(times[each]):.1f} s" for each in times))
    settings = {"rate_mb_s": options.rate, "bytes": size, "tasks": options.tasks}
    report = {"schema": 1, "benchmark": "nodes", **_lib.facts(), **settings, "rows": rows}
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


@contextlib.contextmanager
def cluster(scratch: Path, base: Path, rate: int, nodes: int, size: int) -> Iterator[slurm_cluster.Slurm]:
    """Give a cluster whose nodes have empty disks and empty caches, in front of a server of `rate` MB/s."""
    with contextlib.ExitStack() as undo:
        # Its path must be short: sockets lie in it.
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="n")))
        slurm = slurm_cluster.Slurm(folder, nodes)
        undo.callback(slurm.end)
        slurm.start()
        server = folder / "server"
        undo.enter_context(passthrough.passthrough(base, server, "-o", "direct_io", f"--read-rate={rate}000000"))
        for node in slurm.nodes:
            disk = undo.enter_context(_lib.fresh_place("ext4", scratch, 4 * size + (256 << 20)))
            _lib.call("mount", "--bind", str(disk), str(slurm.disk(node)))
            undo.callback(_lib.unmount, slurm.disk(node))
            mount = folder / "archives" / node
            undo.enter_context(passthrough.passthrough(server, mount, "-o", "kernel_cache"))
        yield slurm


def run(slurm: slurm_cluster.Slurm, candidate: str, tasks: int) -> tuple[float, int]:
    """Return the seconds until all tasks train, and the number of images on each node."""
    page = (_lib.REPOSITORY / "docs" / "clusters.md").read_text(encoding="utf-8")
    [script] = re.findall(r"(?ms)^```bash\n(#!/bin/bash\n#SBATCH.*?)^```$", page)
    archives = slurm.folder / "archives"
    script = script.replace("set -euo pipefail\n", "set -euo pipefail\ndate +%s.%N > begun\n")
    # Of the node: each has a mount of its own.
    script = script.replace("bash -c '\n", f"bash -c '\n  ARCHIVES={archives}/$SLURMD_NODENAME\n")
    if candidate != "imagenet_unpack":
        unpack = TAR.replace("FETCH", FETCH[candidate])
        script = re.sub(r"  exec python -m.*?(?=^'$)", lambda _: unpack, script, flags=re.DOTALL | re.MULTILINE)
    work = slurm.folder / "work"
    work.mkdir()
    (work / "train.py").write_text(TRAIN, encoding="utf-8")
    shape = [f"--nodes={len(slurm.nodes)}", f"--ntasks-per-node={tasks}", f"--chdir={work}"]
    environ = {"PYTHONPATH": str(_lib.REPOSITORY), "PATH": f"{Path(sys.executable).parent}:{slurm.environ['PATH']}"}
    job = slurm.call("sbatch", "--parsable", *shape, text=script, environ=environ)
    state = slurm.wait(job, "COMPLETED", "FAILED", seconds=600)
    if state != "COMPLETED":
        raise SystemExit((work / f"slurm-{job}.out").read_text())
    started = [float(path.read_text()) for path in work.glob("started*")]
    if len(started) != tasks * len(slurm.nodes):
        raise SystemExit(f"{len(started)} tasks trained")
    counts = {sum(1 for _ in (slurm.disk(node) / "ImageNet").rglob("*.JPEG")) for node in slurm.nodes}
    if len(counts) != 1:
        raise SystemExit(f"the nodes hold different numbers of files: {counts}")
    return max(started) - float((work / "begun").read_text()), counts.pop()


if __name__ == "__main__":
    sys.exit(main())
