"""A disk that stops after some operations, and what is then found on it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

from imagenet_unpack.targets.durable import Disk

Contents = dict[str, bytes | None]
"""Bytes of each file by relative path; None for a folder."""
Kind = Literal["kill", "power cut", "late power cut"]


class CrashError(BaseException):
    """The process or the machine is gone."""


def contents(folder: Path) -> Contents:
    return {
        path.relative_to(folder).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


class CrashingDisk(Disk):
    """Stops before operation `after` (from 0) and then restores what a crash of this kind leaves.

    - kill: everything that was done.
    - power cut: the names as they were at the last sync, and of each file what was synced of it.
    - late power cut: the same with all names up to the crash, as a file system's log may have written them by itself.

    Names reach the disk in the order in which they were made, as on ext4, xfs and btrfs.
    """

    def __init__(self, root: Path, kind: Kind, after: int, *, sync_each_file: bool = False) -> None:
        super().__init__(sync_each_file=sync_each_file)
        self._root = root
        self._kind = kind
        self._left = after
        self._clean: dict[int, bytes] = {}
        self.synced(root, everything=True)

    def step(self, operation: str, path: Path) -> None:
        if self._left == 0:
            if self._kind == "late power cut":
                self._platter = self._durable()
            if self._kind != "kill":
                _restore(self._root, self._platter)
            raise CrashError(f"{operation} {path}")
        self._left -= 1

    def synced(self, path: Path, *, everything: bool = False) -> None:
        files = self._files() if everything else [path] if path.is_file() else []
        self._clean |= {file.stat().st_ino: file.read_bytes() for file in files}
        self._platter = self._durable()

    def _files(self) -> list[Path]:
        return [path for path in self._root.rglob("*") if path.is_file()]

    def _durable(self) -> Contents:
        found = contents(self._root)
        for name, live in found.items():
            if live is not None:
                clean = self._clean.get(os.stat(self._root / name).st_ino, b"")
                found[name] = clean if live.startswith(clean) else b""
        return found


def _restore(root: Path, wanted: Contents) -> None:
    shutil.rmtree(root)
    root.mkdir()
    for name, data in wanted.items():
        if data is None:
            (root / name).mkdir(parents=True)
        else:
            (root / name).write_bytes(data)
