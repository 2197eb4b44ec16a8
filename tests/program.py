"""The program as a process of its own, and what it leaves in a target."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from imagenet_unpack.cli import main as cli
from imagenet_unpack.dataset.synth import SynthSpec
from imagenet_unpack.targets.paths import STATE_FOLDER

SPEC = SynthSpec(classes=8, images_per_class=30, val_images=60, mean_bytes=20_000)
SLOW = ("--max-write-rate", "1500kB")
Tree = dict[str, str]


def tree(target: Path) -> Tree:
    return {
        path.relative_to(target).as_posix(): hashlib.blake2b(path.read_bytes()).hexdigest()
        for split in ("train", "val")
        for path in (target / split).rglob("*")
        if path.is_file()
    }


def serial(base: Path, target: Path, *options: str) -> int:
    """Run the program within this process and return its exit code."""
    try:
        return cli.main(["--base-dir", str(base), "--target-dir", str(target), "--executor", "serial", *options])
    except SystemExit as stop:
        return int(stop.code or 0)


class Run:
    """The program as a process of its own, with a session of its own, so that what it leaves behind is seen.

    Its rates are not those of the other tests that run at the same time.
    """

    def __init__(self, base: Path, target: Path, *options: str) -> None:
        self.target = target
        command = [sys.executable, "-m", "imagenet_unpack", "--base-dir", str(base), "--target-dir", str(target)]
        environ = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
        self.process = subprocess.Popen(
            [*command, "--workers", "2", "--progress", "none", "--json", "--rate-dir", str(target.parent), *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environ,
        )  # fmt: skip

    def at_work(self) -> Run:
        """Wait for the first image."""
        staged = self.target / STATE_FOLDER / "train" / "tree"
        deadline = time.monotonic() + 30
        while not any(staged.glob("*/*.JPEG")):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self

    def workers(self) -> list[psutil.Process]:
        """The worker processes: the children of the fork server."""
        children = psutil.Process(self.process.pid).children()
        servers = [each for each in children if "multiprocessing.forkserver" in " ".join(each.cmdline())]
        return [worker for server in servers for worker in server.children()]

    def end(self, timeout: float = 60) -> tuple[int, dict[str, Any], str]:
        out, err = self.process.communicate(timeout=timeout)
        assert "Traceback" not in err, err
        return self.process.returncode, json.loads(out) if out else {}, err

    def wait_until_gone(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while left := [each.pid for each in psutil.process_iter() if session(each.pid) == self.process.pid]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


def session(pid: int) -> int:
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid)
    return -1
