"""What becomes of a shard whose task fails: which thing is blamed, and whether the run can go on."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from factory import images, tar, train_plan, train_tar, write

from imagenet_unpack.errors import ArchiveError, HostError
from imagenet_unpack.extract.throttle import StalledError
from imagenet_unpack.extract.worker import Settings, ShardPace, guarded
from imagenet_unpack.model import Shard, ShardDone, ShardFailed
from imagenet_unpack.sources.reader import SourceError
from imagenet_unpack.targets.paths import STATE_FOLDER
from imagenet_unpack.targets.runfile import RunFile


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    data = train_tar({"n01440764": tar(images("n01440764", [b"a", b"bb"]))})
    return train_plan(write(tmp_path / "train.tar", data)).shards[0]


def unreadable(number: int) -> SourceError:
    error = SourceError(f"archive: cannot be read: {os.strerror(number)}")
    error.__cause__ = OSError(number, os.strerror(number))
    return error


def outcome_of(shard: Shard, error: BaseException, run_file: str = "") -> ShardFailed:
    def task(_: ExitStack) -> ShardDone:
        raise error

    outcome = guarded(shard, Settings(target="/t", part="0-of-1", run_file=run_file), Path("/t/tree"), task)
    assert isinstance(outcome, ShardFailed)
    assert (outcome.shard, outcome.split) == (shard.id, shard.split)
    assert "None" not in outcome.message
    return outcome


@pytest.mark.parametrize(
    ("error", "kind", "fatal"),
    [
        (ArchiveError("damaged"), "archive", False),
        (SourceError("it changed"), "source-io", False),
        (unreadable(errno.EIO), "source-io", False),  # one bad place: the archive can still be read
        (unreadable(errno.ENOTCONN), "source-io", True),
        (unreadable(errno.ESTALE), "source-io", True),
        (unreadable(errno.EMFILE), "host", True),
        (OSError(errno.ENOSPC, "No space left on device", "/t/a"), "target-io", True),
        (OSError(errno.EIO, "Input/output error"), "target-io", True),
        (OSError(errno.ECONNABORTED, "Software caused connection abort"), "target-io", True),
        (OSError(errno.ENOTCONN, "Transport endpoint is not connected"), "target-io", True),
        (OSError(errno.ENAMETOOLONG, "File name too long"), "target-io", False),
        (OSError("no errno at all"), "target-io", False),
        (OSError(), "target-io", False),
        (OSError(errno.EMFILE, "Too many open files"), "host", True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "host", True),
        (MemoryError(), "host", True),
        (RuntimeError("can't start new thread"), "host", True),
        (HostError("the rate file"), "host", True),
        (StalledError("waited for free space"), "stalled", True),
        (KeyError("x"), "defect", False),
        (RuntimeError("x"), "defect", False),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_blamed(shard: Shard, error: BaseException, kind: str, fatal: bool) -> None:
    outcome = outcome_of(shard, error)
    assert (outcome.kind, outcome.fatal) == (kind, fatal)
    assert ("/t/tree" in outcome.message) is (kind == "target-io")
    assert bool(outcome.traceback) is (kind == "defect")


def test_an_archive_that_cannot_be_read_at_all_ends_the_run(shard: Shard) -> None:
    os.truncate(shard.archive.path, 0)
    assert outcome_of(shard, unreadable(errno.EIO)).fatal
    os.unlink(shard.archive.path)
    assert outcome_of(shard, unreadable(errno.EIO)).fatal


def test_errors_of_a_run_that_is_ending_are_no_failures(shard: Shard, tmp_path: Path) -> None:
    (tmp_path / STATE_FOLDER).mkdir()
    run_file = RunFile.create(tmp_path)
    error = OSError(errno.ENOENT, "No such file or directory")
    assert outcome_of(shard, error, str(run_file.path)).kind == "target-io"
    run_file.stop()
    assert outcome_of(shard, error, str(run_file.path)).kind == "stopped"


@pytest.mark.parametrize("step", [lambda pace: pace.window(512), lambda pace: pace.window(0)])
def test_a_shard_is_dropped_at_its_next_window(shard: Shard, tmp_path: Path, step: Callable[[ShardPace], None]) -> None:
    (tmp_path / STATE_FOLDER).mkdir()
    run_file = RunFile.create(tmp_path)
    settings = Settings(target=str(tmp_path), part="0-of-1", run_file=str(run_file.path))

    def task(stack: ExitStack) -> ShardDone:
        pace = ShardPace(shard, settings, tmp_path, stack)
        step(pace)
        return ShardDone(shard=shard.id, split=shard.split, images=0, size_bytes=0)

    assert isinstance(guarded(shard, settings, tmp_path, task), ShardDone)
    run_file.stop()
    outcome = guarded(shard, settings, tmp_path, task)
    assert isinstance(outcome, ShardFailed)
    assert outcome.kind == "stopped"
