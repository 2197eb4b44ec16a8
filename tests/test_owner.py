"""Owner files keep runs apart where both were granted the same lock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from program import SLOW, Run, Tree, tree

from imagenet_unpack.errors import StoppedError
from imagenet_unpack.targets.durable import Disk
from imagenet_unpack.targets.locks import InUseError
from imagenet_unpack.targets.owner import Owner, wait_for_owners
from imagenet_unpack.targets.paths import STATE_FOLDER


def no_pause(_: float) -> None:
    time.sleep(0.01)


def left_behind(path: Path, **changes: object) -> None:
    """Write the owner file of a run that is no more."""
    owner = Owner(path, Disk())
    value = json.loads(path.read_text())
    owner.close()
    path.write_text(json.dumps(value | changes))


def test_is_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "train.0-of-1.owner"
    owner = Owner(path, Disk())
    owner.require()
    assert path.exists()
    owner.close()
    assert not path.exists()
    owner.close()


def test_a_run_that_beats_is_respected(tmp_path: Path) -> None:
    path = tmp_path / "owner"
    owner = Owner(path, Disk(), beat_s=0.02)
    try:
        with pytest.raises(InUseError, match=str(os.getpid())):
            wait_for_owners([path], "the split", pause=no_pause)
        owner.require()
    finally:
        owner.close()


@pytest.mark.parametrize("changes", [{"host": "elsewhere", "boot": "b"}, {"pid_space": "another"}, {}])
def test_one_that_stands_still_is_taken_over(tmp_path: Path, changes: dict[str, object]) -> None:
    path = tmp_path / "owner"
    left_behind(path, **changes)
    began_s = time.monotonic()
    wait_for_owners([path], "the split", pause=no_pause, watch_s=0.2)
    assert time.monotonic() - began_s > 0.15
    assert not path.exists()


def test_a_dead_process_of_this_host_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "owner"
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    left_behind(path, pid=process.pid)
    began_s = time.monotonic()
    wait_for_owners([path], "the split", pause=no_pause, watch_s=5)
    assert time.monotonic() - began_s < 2
    left_behind(path, started="1")  # the number is another process's now
    wait_for_owners([path], "the split", pause=no_pause, watch_s=5)
    assert time.monotonic() - began_s < 4


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b'{"nonce": 1}'])
def test_what_cannot_be_read_is_watched_too(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "owner"
    path.write_bytes(data)
    wait_for_owners([path], "the split", pause=no_pause, watch_s=0.05)
    assert not path.exists()


def test_whoever_lost_its_target_stops(tmp_path: Path) -> None:
    path = tmp_path / "owner"
    owner = Owner(path, Disk())
    other = Owner(path, Disk())
    with pytest.raises(StoppedError, match="taken over"):
        owner.require()
    owner.close()
    other.require()  # nothing of the other one's was removed
    other.close()


@pytest.mark.slow
def test_two_runs_with_the_same_lock(base: Path, tmp_path: Path, expected: Tree) -> None:
    """As two mounts that each grant it: the second run finds the lock free, but not the owner file still."""
    first = Run(base, tmp_path, "--max-write-rate", "400kB").at_work()
    for lock in (tmp_path / STATE_FOLDER).glob("*.lock"):
        lock.unlink()
    code, _, err = Run(base, tmp_path).end()
    assert code == 5, err
    assert str(first.process.pid) in err
    first.process.terminate()
    assert first.end()[0] == 143
    assert Run(base, tmp_path).end()[0] == 0
    assert tree(tmp_path) == expected


@pytest.mark.slow
def test_a_run_whose_owner_file_is_anothers_journals_nothing_more(base: Path, tmp_path: Path) -> None:
    run = Run(base, tmp_path, *SLOW).at_work()
    path = tmp_path / STATE_FOLDER / "train.0-of-1.owner"
    left_behind(path, nonce="another's")
    code, _, err = run.end()
    assert code == 6
    assert "taken over" in err
    assert not (tmp_path / "train").exists()
