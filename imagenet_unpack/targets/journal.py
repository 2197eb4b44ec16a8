"""Which shards are known to be on the disk: the only thing believed on the next start.

A line is appended after everything of the shard has been synced (`split.commit`), and is itself synced. Each part of a
run has a journal of its own, so parts on several nodes never write one file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from imagenet_unpack.errors import TargetError
from imagenet_unpack.model import ShardDone, SplitName
from imagenet_unpack.targets.durable import Disk, read_file

_SUFFIX = ".journal"


def read(home: Path, split: SplitName) -> dict[str, ShardDone]:
    """Return the shards that any part's journal in `home` names, by id.

    A line torn by a crash (cut off, or zeros where its bytes never reached the disk) names none.

    Raises:
        TargetError: a line is damaged in a way that no crash explains.
    """
    done: dict[str, ShardDone] = {}
    for path in sorted(home.glob(f"*{_SUFFIX}")):
        for number, line in enumerate((read_file(path) or b"").split(b"\n"), 1):
            item = _parse(line, split)
            if item is not None:
                done[item.shard] = item
            elif not _torn(line):
                raise TargetError(f"{path} is damaged (line {number}): use --restart to discard the unfinished run")
    return done


def append(disk: Disk, home: Path, part: str, done: Iterable[ShardDone]) -> None:
    """Append shards whose files have been synced, and sync the journal."""
    lines = "".join(json.dumps([item.shard, item.images, item.size_bytes]) + "\n" for item in done)
    # A line torn by a crash is closed first, so that it cannot swallow the next one.
    disk.append(home / f"{part}{_SUFFIX}", ("\n" + lines).encode())


def _parse(line: bytes, split: SplitName) -> ShardDone | None:
    try:
        shard, images, size_bytes = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return None
    if not (isinstance(shard, str) and isinstance(images, int) and isinstance(size_bytes, int)):
        return None
    return ShardDone(shard=shard, split=split, images=images, size_bytes=size_bytes)


def _torn(line: bytes) -> bool:
    if not line or b"\0" in line:
        return True
    return (line.startswith(b'["') or line == b"[") and not line.endswith(b"]")
