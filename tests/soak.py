"""Kill and unplug the program at random moments, and look at what it leaves behind each time.

    python tests/soak.py --kills 200 --power-cuts 40 --consume 60 --images 60

A kill is `kill -9` of the parent, of one of its processes or of all of them. A power cut (needs root and loop mounts)
is the file system's own shutdown call without a log flush, on ext4 and xfs in turn: what was not synced is lost. After
each, every split under its own name must be whole, and the same command must end with the archives' bytes in place.

With --consume every image must be in the archive or known to be on the disk after each crash; with --images an archive
is the whole archive or the whole image, an image has its name only when it is whole, and `restore` brings the archive
back. There the crashes are kills and power cuts in turn, on ext4, xfs and btrfs, by snapshots (`disks.py`).
Prints one JSON object with what was done; ends with 1 at the first tree that is wrong or cannot be finished.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import consuming
import psutil
from disks import KINDS, Disk, disk, forget_owner, snapshot_disk, unmount
from program import Tree, session, tree

from imagenet_unpack.checking.image import check_image
from imagenet_unpack.dataset.synth import SynthSpec, write_archives
from imagenet_unpack.sources.imagerecord import is_image

# The journal is written more often than in life, so that a short run has many commits to be killed between.
PROGRAM = (
    "import sys; from imagenet_unpack.cli.main import main; from imagenet_unpack.run import commits, imageread; "
    "commits.COMMIT_S = imageread.COMMIT_S = 0.1; sys.exit(main())"
)
SPEC = SynthSpec(classes=24, images_per_class=60, val_images=1200, mean_bytes=20_000)
CONSUME = ("--consume", "--yes")
METHODS = ("in-place", "reflink", "copy")


def start(base: Path, target: Path, *options: str, command: str = "unpack") -> subprocess.Popen[bytes]:
    """Begin a run; its output goes to a file beside the target."""
    where = ["--output", str(target)] if command == "image" else ["--target-dir", str(target)]
    where = [] if "in-place" in options else where
    words = [sys.executable, "-c", PROGRAM, command, "--base-dir", str(base), *where, "--workers", "2", *options]
    log = open(target.parent / "log", "ab")  # noqa: SIM115 - the process's own
    return subprocess.Popen([*words, "--progress", "none"], stdout=log, stderr=log, start_new_session=True)


def finish(base: Path, target: Path, *options: str, command: str = "unpack") -> None:
    """Let the same command end what was begun."""
    process = start(base, target, *options, command=command)
    code = process.wait(timeout=120)
    wait_until_gone(process.pid)
    if code:
        text = (target.parent / "log").read_text(errors="replace")[-2000:]
        raise SystemExit(f"the same command ended with {code}: {target}\n{text}")


def verify(target: Path, expected: Tree, *, complete: bool) -> None:
    """Every split that is there is whole; or all of it is."""
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


def soak_power_cuts(
    base: Path, folder: Path, expected: Tree, count: int, chance: random.Random, run_s: float
) -> Counter[str]:
    done: Counter[str] = Counter()
    while sum(done.values()) < count:
        kind = ("ext4", "xfs")[sum(done.values()) % 2]
        after_success = chance.random() < 0.25
        with disk(folder, kind) as made:
            target = made.mount / "here" / "tree"
            target.parent.mkdir()
            process = start(base, target)
            if after_success:
                if process.wait(timeout=120):
                    raise SystemExit(f"ended with {process.returncode}")
            else:
                time.sleep(chance.uniform(0.3, 1) * run_s)
            made.shut_down()
            done[f"{kind} {'after exit 0' if after_success else 'at work'}"] += 1
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=60)
            wait_until_gone(process.pid)
            made.remount()
            target.parent.mkdir(exist_ok=True)
            verify(target, expected, complete=after_success)
            finish(base, target)
            verify(target, expected, complete=True)
    return done


def crash(process: subprocess.Popen[bytes], made: Disk, chance: random.Random, sign: str) -> str:
    """Kill a run, or cut the power, up to a second after it has begun; what is left is mounted. Return what was done.

    Args:
        process: the run.
        made: the disk that it works on.
        chance: chooses.
        sign: pattern of paths on the disk, of which one is there when the run has begun.
    """
    while process.poll() is None and not any(made.mount.glob(sign)):
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 1))
    what, image = "power cut", made.image
    if chance.random() < 0.5:
        what = kill_something(process, chance) or "nothing"
    else:
        image = made.snapshot(chance.randrange(10**6))
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    wait_until_gone(process.pid)
    if image != made.image:
        unmount(made.mount)
        made.image.unlink()
        image.rename(made.image)
        made.show(made.image)
    return what


def soak_consume(base: Path, folder: Path, expected: Tree, count: int, chance: random.Random) -> Counter[str]:
    """Crash runs that consume their archives."""
    done: Counter[str] = Counter()
    images = consuming.places(base)
    for kind in itertools.cycle(KINDS):
        if sum(done.values()) >= count:
            break
        with snapshot_disk(folder, kind) as made:
            archives, target = made.mount / "in", made.mount / "here" / "tree"
            shutil.copytree(base, archives)
            target.parent.mkdir()
            os.sync()
            for _ in range(chance.randint(1, 3)):
                process = start(archives, target, *CONSUME)
                what = crash(process, made, chance, "here/tree/.imagenet_unpack/train/tree/*")
                state = "unfinished" if consuming.unfinished(target) else "before or after"
                done[f"{kind}, {what}, {state}"] += 1
                missing = consuming.lost(images, archives, target)
                if missing:
                    raise SystemExit(f"{target}: {len(missing)} images are lost, such as {missing[:3]}")
                verify(target, expected, complete=False)
                if what == "power cut":
                    forget_owner(target)
            finish(archives, target, *CONSUME)
            verify(target, expected, complete=True)
    return done


def soak_images(base: Path, folder: Path, count: int, chance: random.Random) -> Counter[str]:
    """Crash the making of images and the restoring of archives."""
    done: Counter[str] = Counter()
    before = {path.name: path.read_bytes() for path in base.glob("*.tar")}
    for kind in itertools.cycle(KINDS):
        if sum(done.values()) >= count:
            break
        method = chance.choice(METHODS if kind != "ext4" else ("in-place", "copy"))
        options = ("--method", method, "--yes", "--min-free-space", "0")
        with snapshot_disk(folder, kind) as made:
            archives, output = made.mount / "in", made.mount / "image"
            shutil.copytree(base, archives)
            os.sync()
            for _ in range(chance.randint(1, 3)):
                process = start(archives, output, *options, command="image")
                what = crash(process, made, chance, "**/.*.imagenet_unpack/plan.json")
                done[f"{kind}, {method}, {what}"] += 1
                require_whole(archives, before, output)
            finish(archives, output, *options, command="image")
            require_whole(archives, before, output)
            for name in before if method == "in-place" else ():
                what = crash(restoring(archives / name), made, chance, "in/.*.imagenet_unpack/original.json")
                done[f"{kind}, restore, {what}"] += 1
                require_whole(archives, before, output)
                state = archives / f".{name}.imagenet_unpack"
                if is_image(archives / name) or state.exists():
                    code = restoring(archives / name).wait(timeout=60)
                    if code:
                        raise SystemExit(f"restore of {archives / name} ended with {code}")
                if state.exists() or (archives / name).read_bytes() != before[name]:
                    raise SystemExit(f"{archives / name} is not the archive that it was")
    return done


def restoring(archive: Path) -> subprocess.Popen[bytes]:
    log = open(archive.parent.parent / "log", "ab")  # noqa: SIM115 - the process's own
    words = [sys.executable, "-c", PROGRAM, "restore", str(archive)]
    return subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)


def require_whole(archives: Path, before: dict[str, bytes], output: Path) -> None:
    """Every archive is the whole archive or the whole image, and what has the image's name is whole."""
    for name, content in before.items():
        path = archives / name
        if not (_is_whole(path) if is_image(path) else path.read_bytes()[: len(content)] == content):
            raise SystemExit(f"{path} is neither the whole archive nor the whole image")
    if output.exists() and not _is_whole(output):
        raise SystemExit(f"{output} has its name and is not whole")


def _is_whole(image: Path) -> bool:
    return not any(split.problems for split in check_image(image, deep=True, workers=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--power-cuts", type=int, default=40)
    parser.add_argument("--consume", type=int, default=0)
    parser.add_argument("--images", type=int, default=0)
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
        consumed = soak_consume(base, folder, expected, args.consume, chance)
        images = soak_images(base, folder, args.images, chance)
    counts = {"kills": kills, "power_cuts": cuts, "consume": consumed, "images": images}
    print(json.dumps({"seed": args.seed, **counts, "elapsed_s": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
