from __future__ import annotations

import os
import platform
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imagenet_unpack.cli import main as cli
from imagenet_unpack.targets.locks import InUseError, LockFile, lease, turn, wait_for_leases


def test_only_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with LockFile(path, "the split") as first, LockFile(path, "the split") as second:
        first.take()
        first.sign()
        with pytest.raises(InUseError, match=f"process {os.getpid()}"):
            second.take()
        first.close()
        second.take()


def test_readers_share(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with LockFile(path) as first, LockFile(path) as second, LockFile(path) as third:
        first.take(shared=True)
        second.take(shared=True)
        with pytest.raises(InUseError):
            third.take()


def test_waits_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lock"
    pauses: list[float] = []
    with LockFile(path) as first, LockFile(path, "the split") as second:
        first.take()

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 3:
                first.close()

        second.take(pause=pause)
    assert len(pauses) == 3
    assert [record.message.startswith("waiting: the split") for record in caplog.records] == [True]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_follows_the_umask(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        LockFile(tmp_path / "lock").close()
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == 0o666 & ~umask


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        LockFile(tmp_path / "lock")
    assert not (tmp_path / "elsewhere").exists()


def test_turn_waits(tmp_path: Path) -> None:
    with turn(tmp_path / "lock"), LockFile(tmp_path / "lock") as other:
        assert not other.attempt()
        assert not other.wait(time.monotonic() + 0.1)
    with LockFile(tmp_path / "lock") as other:
        assert other.attempt()


def test_leases_are_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "train.0-of-1.lease"
    with lease(path), lease(path), LockFile(path) as other:
        assert not other.attempt()
    wait_for_leases([path])


# seccomp(2): a filter in the kernel by which flock fails, as on a file system without locks.
WITHOUT_FLOCK = """
import ctypes, errno, os, struct, sys
flock = {"x86_64": 73, "aarch64": 32}[os.uname().machine]
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, flock), (0x06, 0, 0, 0x00050000 | errno.ENOLCK), (0x06, 0, 0, 0x7fff0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
if libc.prctl(22, 2, program, 0, 0) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    sys.exit(99)
os.execv(sys.executable, [sys.executable, "-m", "imagenet_unpack", *sys.argv[1:]])
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="the number of flock is not known here")
@pytest.mark.parametrize(
    ("options", "code", "said"), [(("--wait",), 5, "--wait needs file locks"), ((), 0, "no locks")]
)
def test_a_file_system_without_locks(
    base: Path, tmp_path: Path, options: tuple[str, ...], code: int, said: str
) -> None:
    arguments = [
        "--base-dir",
        str(base),
        "--target-dir",
        str(tmp_path / "t"),
        "--splits",
        "val",
        "--executor",
        "serial",
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FLOCK, *arguments, *options],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])},
    )  # fmt: skip
    if done.returncode == 99:
        pytest.skip("system calls cannot be filtered here")
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert (tmp_path / "t" / "val").exists() is (code == 0)
