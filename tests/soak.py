"""Kill and unplug the program at random moments, and look at what it leaves behind each time.

    python tests/soak.py --kills 200 --power-cuts 40

A kill is `kill -9` of the parent, of one of its processes or of all of them. A power cut (needs root and loop mounts)
is the file system's own shutdown call without a log flush, on ext4 and xfs in turn: what was not synced is lost. After
each, every split under its own name must be whole, and the same command must end with the archives' bytes in place.
Prints one JSON object with what was done; ends with 1 at the first tree that is wrong or cannot be finished.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from program import Tree, session, tree

from imagenet_unpack.dataset.synth import SynthSpec, write_archives

# EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN: _IOR('X', 125, __u32); 2 is "no log flush" (fs/ext4/ext4.h, xfs_fs.h).
SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2
# The journal is written more often than in life, so that a short run has many commits to be killed between.
PROGRAM = (
    "import sys; from imagenet_unpack.cli.main import main; from imagenet_unpack.run import commits; "
    "commits.COMMIT_S = 0.1; sys.exit(main())"
)
SPEC = SynthSpec(classes=24, images_per_class=60, val_images=1200, mean_bytes=20_000)
MKFS = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"]}
IMAGE_BYTES = 400 << 20


def start(base: Path, target: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, "--base-dir", str(base), "--target-dir", str(target), "--workers", "2"]
    log = open(target.parent / "log", "ab")  # noqa: SIM115 - the process's own
    return subprocess.Popen([*command, "--progress", "none"], stdout=log, stderr=log, start_new_session=True)


def finish(base: Path, target: Path) -> None:
    process = start(base, target)
    code = process.wait(timeout=120)
    wait_until_gone(process.pid)
    if code:
        text = (target.parent / "log").read_text(errors="replace")[-2000:]
        raise SystemExit(f"the same command ended with {code}: {target}\n{text}")


def verify(target: Path, expected: Tree, *, complete: bool) -> None:
    """Every split that stands there is whole; or all of it is."""
    found = tree(target)
    wanted = {name: digest for name, digest in expected.items() if complete or (target / name.split("/")[0]).exists()}
    if found != wanted:
        wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise SystemExit(f"{target}: {len(wrong)} files are wrong, such as {wrong[:3]}")


def wait_until_gone(leader: int) -> float:
    """Wait until no process of the session is left; it must not take 15 s."""
    began = time.monotonic()
    while any(session(each.pid) == leader for each in psutil.process_iter()):
        if time.monotonic() - began > 15:
            raise SystemExit(f"processes of session {leader} are alive 15 s after the kill")
        time.sleep(0.05)
    return time.monotonic() - began


def kill_something(process: subprocess.Popen[bytes], chance: random.Random) -> str | None:
    what = chance.choice(["parent", "worker", "all"])
    with suppress(psutil.Error, ProcessLookupError):
        if what == "parent":
            process.kill()
        elif what == "all":
            os.killpg(process.pid, signal.SIGKILL)
        elif children := psutil.Process(process.pid).children(recursive=True):
            chance.choice(children).kill()
        else:
            return None
    return what


def soak_kills(
    base: Path, folder: Path, expected: Tree, count: int, chance: random.Random, run_s: float
) -> Counter[str]:
    done: Counter[str] = Counter()
    while sum(done.values()) < count:
        target = folder / "kill" / "tree"
        target.parent.mkdir()
        for _ in range(chance.randint(1, 3)):  # the run that goes on is killed too
            process = start(base, target)
            time.sleep(chance.uniform(0, 1.1 * run_s))
            what = kill_something(process, chance)
            process.wait(timeout=120)
            if what is not None:
                unfinished = any(target.glob(".imagenet_unpack/*/plan.json"))
                done[f"{what}, {'unfinished' if unfinished else 'before or after'}"] += 1
            wait_until_gone(process.pid)
            verify(target, expected, complete=False)
        finish(base, target)
        verify(target, expected, complete=True)
        shutil.rmtree(target.parent)
    return done


@contextmanager
def file_system(folder: Path, kind: str) -> Iterator[tuple[Path, Path]]:
    image, mount = folder / "image", folder / "mount"
    mount.mkdir(exist_ok=True)
    with open(image, "wb") as file:
        file.truncate(IMAGE_BYTES)
    subprocess.run([*MKFS[kind], str(image)], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
    try:
        yield image, mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)
        image.unlink()


def power_cut(image: Path, mount: Path) -> None:
    fd = os.open(mount, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
    finally:
        os.close(fd)


def remount(image: Path, mount: Path) -> None:
    subprocess.run(["umount", str(mount)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)


def soak_power_cuts(
    base: Path, folder: Path, expected: Tree, count: int, chance: random.Random, run_s: float
) -> Counter[str]:
    done: Counter[str] = Counter()
    while sum(done.values()) < count:
        kind = ("ext4", "xfs")[sum(done.values()) % 2]
        after_success = chance.random() < 0.25
        with file_system(folder, kind) as (image, mount):
            target = mount / "here" / "tree"
            target.parent.mkdir()
            process = start(base, target)
            if after_success:
                if process.wait(timeout=120):
                    raise SystemExit(f"ended with {process.returncode}")
            else:
                time.sleep(chance.uniform(0.3, 1) * run_s)
            power_cut(image, mount)
            done[f"{kind} {'after exit 0' if after_success else 'at work'}"] += 1
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=60)
            wait_until_gone(process.pid)
            remount(image, mount)
            target.parent.mkdir(exist_ok=True)
            verify(target, expected, complete=after_success)
            finish(base, target)
            verify(target, expected, complete=True)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--power-cuts", type=int, default=40)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    chance = random.Random(args.seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        base, first = folder / "archives", folder / "first" / "tree"
        write_archives(base, SPEC)
        first.parent.mkdir()
        start_s = time.monotonic()
        finish(base, first)
        run_s = time.monotonic() - start_s
        expected = tree(first)
        kills = soak_kills(base, folder, expected, args.kills, chance, run_s)
        cuts = soak_power_cuts(base, folder, expected, args.power_cuts, chance, run_s)
    result = {"seed": args.seed, "kills": kills, "power_cuts": cuts, "elapsed_s": round(time.monotonic() - began)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
