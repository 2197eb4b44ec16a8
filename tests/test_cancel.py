from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from imagenet_unpack.errors import CancelledError, ExitCode
from imagenet_unpack.run.cancel import Cancel
from imagenet_unpack.targets.paths import STATE_FOLDER
from imagenet_unpack.targets.runfile import RunFile, says_stop


class Calls(list[str]):
    """Notes down what is called, and lets a test wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()

    def note(self, name: str) -> None:
        with self._changed:
            self.append(name)
            self._changed.notify_all()

    def wait_for(self, name: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: name in self, 10), list(self)


def quick(calls: Calls) -> Cancel:
    return Cancel(lambda code, _: calls.note(f"leave {code}"), kill_after_s=0.1, leave_after_s=0.2)


def test_nothing_happens_without_a_request() -> None:
    cancel = Cancel()
    cancel.check()
    assert not cancel.requested
    assert not cancel.wait(0.01)


def test_a_request_is_seen_by_whoever_asks() -> None:
    cancel = Cancel()
    cancel.request(signal.SIGTERM)
    assert cancel.requested
    assert cancel.wait(10)
    assert cancel.exit_code == ExitCode.SIGTERM
    with pytest.raises(CancelledError):
        cancel.check()


def test_the_first_signal_counts_and_a_fatal_outcome_is_no_signal() -> None:
    cancel = Cancel()
    cancel.request()
    assert cancel.exit_code == ExitCode.STOPPED
    cancel.request(signal.SIGUSR1)
    cancel.request(signal.SIGTERM)
    assert cancel.exit_code == ExitCode.SIGUSR1


def test_workers_are_told_then_killed_then_the_program_is_left() -> None:
    calls = Calls()
    cancel = quick(calls)
    with cancel.workers(stop=lambda: calls.note("stop"), kill=lambda: calls.note("kill")):
        cancel.request(signal.SIGINT)
        calls.wait_for("leave 130")
    assert calls == ["stop", "kill", "leave 130"]


def test_a_run_that_ends_is_left_alone() -> None:
    calls = Calls()
    cancel = quick(calls)
    with cancel.watched(), cancel.workers(stop=lambda: calls.note("stop"), kill=lambda: calls.note("kill")):
        cancel.request(signal.SIGINT)
        calls.wait_for("stop")
    time.sleep(0.4)
    assert calls == ["stop"]


def test_a_target_that_hangs_holds_nobody_up() -> None:
    """Telling the workers never returns; the request does, and the rest follows."""
    calls = Calls()
    hang = threading.Event()
    cancel = quick(calls)

    def hangs() -> None:
        hang.wait()

    with cancel.workers(stop=hangs, kill=lambda: calls.note("kill")):
        began_s = time.monotonic()
        cancel.request(signal.SIGTERM)
        assert time.monotonic() - began_s < 0.1
        calls.wait_for("leave 143")
    hang.set()
    assert calls == ["kill", "leave 143"]


def test_a_failing_target_is_no_news() -> None:
    def fail() -> None:
        raise OSError(5, "Input/output error")

    calls = Calls()
    cancel = quick(calls)
    with cancel.workers(stop=fail, kill=lambda: calls.note("kill")):
        cancel.request()
        calls.wait_for("kill")


def test_a_request_before_there_are_workers_reaches_them() -> None:
    calls = Calls()
    cancel = Cancel()
    cancel.request()
    with cancel.workers(stop=lambda: calls.note("stop"), kill=lambda: calls.note("kill")):
        calls.wait_for("stop")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / STATE_FOLDER).mkdir()
    return tmp_path


class TestRunFile:
    def test_says_stop_when_it_is_told(self, target: Path) -> None:
        file = RunFile.create(target)
        assert not says_stop(str(file.path))
        file.stop()
        assert says_stop(str(file.path))
        file.remove()
        assert list((target / STATE_FOLDER).iterdir()) == []

    def test_its_absence_means_nothing(self, target: Path) -> None:
        file = RunFile.create(target)
        file.path.unlink()
        assert not says_stop(str(file.path))
        file.stop()
        assert says_stop(str(file.path))

    def test_two_runs_never_share_one(self, target: Path) -> None:
        first, second = RunFile.create(target), RunFile.create(target)
        first.stop()
        assert not says_stop(str(second.path))

    def test_is_not_empty_and_old_ones_are_removed(self, target: Path) -> None:
        old, other = RunFile.create(target), RunFile.create(target)
        assert old.path.stat().st_size > 0
        os.utime(old.path, (1, 1))
        RunFile.create(target)
        assert not old.path.exists()
        assert other.path.exists()

    def test_a_link_in_its_place_is_not_followed(self, target: Path, tmp_path: Path) -> None:
        file = RunFile.create(target)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.write_bytes(b"stop   \n")
        file.path.unlink()
        file.path.symlink_to(elsewhere)
        assert not says_stop(str(file.path))
        with pytest.raises(OSError, match=file.path.name):
            file.stop()
