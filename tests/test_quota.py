from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagenet_unpack.host import quota, resources

SOMEBODY = 54321
_SET = 0x800008


def test_root_and_file_systems_without_quotas_have_no_bound(tmp_path: Path) -> None:
    assert quota.left(tmp_path) == (math.inf, math.inf)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    if os.geteuid() or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and e2fsprogs to mount a file system with quotas")
    image, folder = tmp_path / "image", tmp_path / "mount"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "quota", image], check=True)
    folder.mkdir()
    done = subprocess.run(["mount", "-o", "loop,usrquota", image, folder], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this kernel mounts no ext4 with quotas: {done.stderr.strip()}")
    device = subprocess.run(
        ["findmnt", "-n", "-o", "SOURCE", folder], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        yield folder, device
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.root
def test_a_users_quota_bounds_the_room(mount: tuple[Path, str]) -> None:
    folder, device = mount
    block = quota.Block(bhardlimit=10_240, ihardlimit=100, valid=1 | 4)
    command = ctypes.c_int((_SET << 8 | quota.USER) & 0xFFFFFFFF)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.quotactl(command, os.fsencode(device), SOMEBODY, ctypes.byref(block)):
        pytest.skip(f"quotactl: {os.strerror(ctypes.get_errno())}")
    (folder / "used").write_bytes(bytes(1 << 20))
    os.chown(folder / "used", SOMEBODY, SOMEBODY)
    os.sync()
    os.seteuid(SOMEBODY)
    try:
        size, files = quota.left(folder)
        room = resources.room(folder, content_bytes=9 << 20, files=200)
    finally:
        os.seteuid(0)
    assert size == (10 << 20) - (1 << 20)
    assert files == 99
    assert room.files_free == 99
    assert room.bytes_free == 9 << 20
    assert "bytes" in str(room.fault)


def test_the_tightest_of_user_and_groups_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel would tell is made up here: not every kernel has quotas."""
    told = {
        (quota.USER, 1000): quota.Block(bhardlimit=1000, curspace=24_000, ihardlimit=0),
        (quota.GROUP, 7): quota.Block(bhardlimit=0, ihardlimit=50, curinodes=60),
        (quota.GROUP, 8): quota.Block(bhardlimit=2000, curspace=0, ihardlimit=90, curinodes=0),
    }
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "getegid", lambda: 7)
    monkeypatch.setattr(os, "getgroups", lambda: [7, 8, 9])
    monkeypatch.setattr(quota, "_get", lambda _device, kind, number: told.get((kind, number)))
    assert quota.left(tmp_path) == (1_000_000, 0)
