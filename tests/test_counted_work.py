"""A guard on counted work, not on time: what an image costs in system calls, in bytes read and in CPU."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from imagenet_unpack.cli import main as cli
from imagenet_unpack.dataset.synth import SynthSpec, write_archives

CLASSES, IMAGES = 8, 250
TOTAL = CLASSES * IMAGES


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    write_archives(folder, SynthSpec(classes=CLASSES, images_per_class=IMAGES, val_images=0, mean_bytes=20_000))
    return folder


def arguments(base: Path, target: Path) -> list[str]:
    common = ["--base-dir", str(base), "--target-dir", str(target), "--executor", "serial", "--progress", "none"]
    return [*common, "--min-free-space", "0", "--min-free-memory", "0"]


def test_an_image_is_one_open_one_write_and_one_close(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    read = [0]

    def counted(name: str, real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            result = real(*args, **options)
            if name == "preadv":
                read[0] += result
            return result

        return call

    for name in ("open", "write", "close", "preadv", "pread", "stat", "unlink", "lseek"):
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    assert cli.main(arguments(base, tmp_path)) == 0
    size = (base / "ILSVRC2012_img_train.tar").stat().st_size
    few = 60 + 20 * CLASSES
    assert TOTAL <= calls["open"] <= TOTAL + few
    assert TOTAL <= calls["write"] <= TOTAL + few
    assert TOTAL <= calls["close"] <= TOTAL + few
    assert calls["preadv"] <= size / (8 << 20) + 2 * CLASSES
    assert calls["pread"] <= few
    assert calls["unlink"] <= few
    assert read[0] <= size


def test_cpu_an_image(base: Path, tmp_path: Path) -> None:
    """Far above what it takes on machines of these days, far below what a second look at every byte would."""
    cli.main(arguments(base, tmp_path / "warm"))
    before = resource.getrusage(resource.RUSAGE_SELF)
    assert cli.main(arguments(base, tmp_path / "t")) == 0
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert (after.ru_utime - before.ru_utime) / TOTAL < 0.5e-3


@pytest.mark.slow
def test_system_calls_an_image_as_the_kernel_counts_them(base: Path, tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")

    def calls(target: Path, *options: str) -> int:
        log = target.with_suffix(".strace")
        command = ["strace", "-f", "-c", "-o", str(log), sys.executable, "-m", "imagenet_unpack"]
        environ = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
        done = subprocess.run(
            [*command, *arguments(base, target), *options], env=environ, capture_output=True, check=False
        )
        if b"ptrace" in done.stderr.lower():
            pytest.skip("strace may not trace here")
        assert done.returncode == 0, done.stderr
        total = re.search(r"^\s*\S+\s+\S+\s+\S+\s+(\d+)\s+(?:\d+\s+)?total$", log.read_text(), re.MULTILINE)
        assert total is not None
        return int(total[1])

    # One class costs the start of the program and its own images; what all cost beyond that is the other images'.
    work = calls(tmp_path / "all") - calls(tmp_path / "one", "--classes", "0")
    images = TOTAL - IMAGES
    # Open, write and close; and a look at its size before it is published.
    assert 4 * images <= work <= 4.1 * images + 100 * CLASSES
