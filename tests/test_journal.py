from __future__ import annotations

from pathlib import Path

import pytest

from imagenet_unpack.errors import TargetError
from imagenet_unpack.model import ShardDone
from imagenet_unpack.targets import journal
from imagenet_unpack.targets.durable import Disk


def done(shard: str) -> ShardDone:
    return ShardDone(shard=shard, split="train", images=3, size_bytes=100)


def test_parts_are_read_together(tmp_path: Path) -> None:
    journal.append(Disk(), tmp_path, "0-of-2", [done("a"), done("b")])
    journal.append(Disk(), tmp_path, "1-of-2", [done("c")])
    journal.append(Disk(), tmp_path, "0-of-2", [done("d")])
    assert journal.read(tmp_path, "train") == {name: done(name) for name in "abcd"}


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_torn_line_names_nothing_and_swallows_nothing(tmp_path: Path, cut: int) -> None:
    journal.append(Disk(), tmp_path, "0-of-1", [done("a")])
    path = tmp_path / "0-of-1.journal"
    whole = path.read_bytes()
    journal.append(Disk(), tmp_path, "0-of-1", [done("b")])
    path.write_bytes(path.read_bytes()[:-cut])
    assert "a" in journal.read(tmp_path, "train")
    journal.append(Disk(), tmp_path, "0-of-1", [done("c")])
    assert {"a", "c"} <= journal.read(tmp_path, "train").keys()
    path.write_bytes(whole + bytes(40))  # the length reached the disk, the bytes did not
    journal.append(Disk(), tmp_path, "0-of-1", [done("c")])
    assert journal.read(tmp_path, "train").keys() == {"a", "c"}


@pytest.mark.parametrize(
    "line", [b"{}", b"null", b"x", b'["a", "b", 1]', b'["a"]', b"[" * 200_000, b"\xff", b"[1, 2, 3]"]
)
def test_what_no_crash_explains_is_damage(tmp_path: Path, line: bytes) -> None:
    journal.append(Disk(), tmp_path, "0-of-1", [done("a")])
    path = tmp_path / "0-of-1.journal"
    with open(path, "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(TargetError, match=str(path)):
        journal.read(tmp_path, "train")


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "0-of-1.journal").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        journal.append(Disk(), tmp_path, "0-of-1", [done("a")])
    assert not (tmp_path / "elsewhere").exists()
