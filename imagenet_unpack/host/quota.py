"""User and group quotas, as the kernel tells them (quotactl(2)); network file systems mostly do not."""

from __future__ import annotations

import ctypes
import functools
import math
import os
from pathlib import Path

USER, GROUP = 0, 1
_GET = 0x800007


class Block(ctypes.Structure):
    """`struct if_dqblk` of linux/quota.h; limits in blocks of 1024 bytes, 0: none; space in bytes."""

    _fields_ = (
        ("bhardlimit", ctypes.c_uint64),
        ("bsoftlimit", ctypes.c_uint64),
        ("curspace", ctypes.c_uint64),
        ("ihardlimit", ctypes.c_uint64),
        ("isoftlimit", ctypes.c_uint64),
        ("curinodes", ctypes.c_uint64),
        ("btime", ctypes.c_uint64),
        ("itime", ctypes.c_uint64),
        ("valid", ctypes.c_uint32),
    )


def left(path: Path) -> tuple[float, float]:
    """Return the bytes and files that quotas leave to this user on the file system of `path`; infinity without one.

    Root is bound by none.
    """
    if os.geteuid() == 0:
        return math.inf, math.inf
    device = _device(os.stat(path).st_dev)
    size, files = math.inf, math.inf
    for kind, number in ((USER, os.geteuid()), *((GROUP, group) for group in {os.getegid(), *os.getgroups()})):
        block = _get(device, kind, number)
        if block is not None and block.bhardlimit:
            size = min(size, max(0, block.bhardlimit * 1024 - block.curspace))
        if block is not None and block.ihardlimit:
            files = min(files, max(0, block.ihardlimit - block.curinodes))
    return size, files


def _get(device: str, kind: int, number: int) -> Block | None:
    block = Block()
    command = ctypes.c_int((_GET << 8 | kind) & 0xFFFFFFFF)
    failed = ctypes.CDLL(None).quotactl(command, os.fsencode(device), number, ctypes.byref(block)) if device else -1
    return None if failed else block


@functools.cache
def _device(number: int) -> str:
    """Return the device that is mounted as the file system `number` (proc_pid_mountinfo(5)), or nothing."""
    wanted = f"{os.major(number)}:{os.minor(number)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        left_side, _, right = line.partition(" - ")
        if left_side.split(" ")[2] == wanted:
            source = right.split(" ")[1]
            return source if source.startswith("/") else ""
    return ""
