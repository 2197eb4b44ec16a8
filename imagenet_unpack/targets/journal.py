"""Which shards are known to be on the disk: the only thing believed on the next start.

A line is appended after the file system that holds the shard's files has been synced, and is itself synced. Each part
of a run has a journal of its own, so parts on several nodes never write one file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from imagenet_unpack.model import ShardDone, SplitName

_SUFFIX = ".journal"


def read(home: Path, split: SplitName) -> dict[str, ShardDone]:
    """Return the shards that any part's journal in `home` names, by id; a torn last line is left out."""
    done: dict[str, ShardDone] = {}
    for path in sorted(home.glob(f"*{_SUFFIX}")):
        for line in path.read_bytes().splitlines():
            try:
                shard, images, size_bytes = json.loads(line)
            except ValueError:
                continue
            done[shard] = ShardDone(shard=shard, split=split, images=images, size_bytes=size_bytes)
    return done


def append(home: Path, part: str, done: Iterable[ShardDone]) -> None:
    """Append shards whose files have been synced, and sync the journal."""
    # A line torn by a crash is closed first, so that it cannot swallow the next one.
    lines = "".join(json.dumps([item.shard, item.images, item.size_bytes]) + "\n" for item in done)
    fd = os.open(home / f"{part}{_SUFFIX}", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, ("\n" + lines).encode())
        os.fsync(fd)
    finally:
        os.close(fd)
