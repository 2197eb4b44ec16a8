from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imagenet_unpack.cli.signals import Interrupted, interrupt, taken_signals
from imagenet_unpack.dataset.synth import SynthSpec, write_archives
from imagenet_unpack.errors import ExitCode
from imagenet_unpack.host.signals import SIGNALS
from imagenet_unpack.run.cancel import Cancel

PACKAGE = str(Path(__file__).parents[1])
ENVIRON = {**os.environ, "PYTHONPATH": PACKAGE}


def never(number: int) -> None:
    raise AssertionError(number)


def wait_until_requested(cancel: Cancel) -> None:
    deadline_s = time.monotonic() + 10
    while not cancel.requested:  # in short steps: a thread of another test may be the one that the signal reaches
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def wait_for_an_exception() -> None:
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:  # in short steps, as above
        time.sleep(0.01)


def test_signals_are_taken_and_given_back() -> None:
    mask, handlers = signal.pthread_sigmask(signal.SIG_BLOCK, []), [signal.getsignal(number) for number in SIGNALS]
    cancel = Cancel()
    with taken_signals(cancel):
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_until_requested(cancel)
        os.kill(os.getpid(), signal.SIGUSR2)
    assert cancel.exit_code == ExitCode.SIGUSR1
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


def test_where_no_thread_can_be_started_handlers_take_the_signals() -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    usual = threading.stack_size(1 << 46)  # more than there are addresses
    try:
        with pytest.raises(RuntimeError):
            threading.Thread(target=wait_for_an_exception).start()
        cancel = Cancel()
        with taken_signals(cancel):
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until_requested(cancel)
        assert cancel.exit_code == ExitCode.SIGUSR1

        def body() -> None:
            with interrupt(never, grace_s=30):
                os.kill(os.getpid(), signal.SIGTERM)
                wait_for_an_exception()

        with pytest.raises(Interrupted):
            body()
    finally:
        threading.stack_size(usual)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_interrupts_what_the_main_thread_does(number: signal.Signals) -> None:
    def body() -> None:
        with interrupt(never, grace_s=30):
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
            wait_for_an_exception()

    with pytest.raises(Interrupted) as caught:
        body()
    assert caught.value.number == number


def test_of_nested_blocks_the_inner_one_counts() -> None:
    cancel = Cancel()

    def body() -> None:
        with interrupt(never, grace_s=30):
            with taken_signals(cancel):
                os.kill(os.getpid(), signal.SIGTERM)
                wait_until_requested(cancel)
            os.kill(os.getpid(), signal.SIGINT)
            wait_for_an_exception()

    with pytest.raises(Interrupted):
        body()
    assert cancel.exit_code == ExitCode.SIGTERM


# As in a call that does not return: what wakes the main thread waits as well, from before the first signal is sent.
HANGS = """
import os, signal
from imagenet_unpack.cli.signals import interrupt, taken_signals
from imagenet_unpack.run.cancel import Cancel

def leave(code, why=""):
    print(why, flush=True)
    os._exit(code)

with {block}:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGURG])
    print("ready", flush=True)
    signal.sigwait([signal.SIGALRM])
"""
RUN = "taken_signals(Cancel(leave, kill_after_s=0.5, leave_after_s=1))"
OTHER = "interrupt(lambda number: leave(128 + number), grace_s={grace_s})"


@pytest.mark.parametrize(
    ("block", "signals", "code"),
    [
        (RUN, [signal.SIGTERM], 143),
        (RUN, [signal.SIGINT, signal.SIGINT], 130),
        (OTHER.format(grace_s=0.5), [signal.SIGTERM], 143),
        (OTHER.format(grace_s=60), [signal.SIGINT, signal.SIGINT], 130),
        (OTHER.format(grace_s=60), [signal.SIGTERM, signal.SIGINT], 143),
    ],
)
def test_a_main_thread_that_hangs_is_left(block: str, signals: list[int], code: int) -> None:
    command = [sys.executable, "-c", HANGS.format(block=block)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRON) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for number in signals:
            process.send_signal(number)
            time.sleep(0.1)
        assert process.wait(timeout=5) == code
        assert ("run the same command again to continue" in process.stdout.read()) == (block == RUN)


@contextmanager
def stoppable(below: Path, mount: Path) -> Iterator[int]:
    """Show a folder through FUSE; yields the process whose stop lets every call hang."""
    if shutil.which("bindfs") is None or os.geteuid():
        pytest.skip("needs bindfs and root")
    mount.mkdir()
    options = "attr_timeout=0,entry_timeout=0,negative_timeout=0"
    with subprocess.Popen(["bindfs", "-f", "-o", options, str(below), str(mount)]) as server:
        try:
            while not mount.is_mount():
                assert server.poll() is None
                time.sleep(0.02)
            yield server.pid
        finally:
            server.send_signal(signal.SIGCONT)
            subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.root
@pytest.mark.parametrize(
    ("arguments", "signals", "code"),
    [
        (["check", "fuse/ImageNet"], [signal.SIGINT], 130),
        (["check", "fuse/ImageNet", "--deep"], [signal.SIGTERM], 143),
        (["plan", "--base-dir", "fuse"], [signal.SIGTERM], 143),
        (["plan", "--base-dir", "below", "--target-dir", "fuse/t"], [signal.SIGINT], 130),
        (["tune", "--base-dir", "below", "--target-dir", "fuse"], [signal.SIGINT, signal.SIGINT], 130),
        (["unpack", "--base-dir", "below", "--target-dir", "fuse/t"], [signal.SIGINT, signal.SIGINT], 130),
        (["report", "fuse/ImageNet"], [signal.SIGTERM], 143),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and isinstance(value[0], str) else "",
)
def test_a_target_that_hangs_holds_no_command_up(
    tmp_path: Path, arguments: list[str], signals: list[int], code: int
) -> None:
    (tmp_path / "below").mkdir()
    write_archives(tmp_path / "below", SynthSpec(classes=2, images_per_class=2, val_images=2, mean_bytes=300))
    (tmp_path / "below" / "ImageNet" / "train" / "0").mkdir(parents=True)
    command = [sys.executable, "-m", "imagenet_unpack", *arguments]
    with stoppable(tmp_path / "below", tmp_path / "fuse") as server:
        os.kill(server, signal.SIGSTOP)
        with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=ENVIRON) as process:
            time.sleep(2)
            assert process.poll() is None
            for number in signals:
                process.send_signal(number)
                time.sleep(0.3)
            _, err = process.communicate(timeout=8)
    assert process.returncode == code
    assert "Traceback" not in err
