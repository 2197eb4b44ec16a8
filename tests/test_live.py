from __future__ import annotations

import os
from pathlib import Path

from imagenet_unpack.host.status import Board, Word
from imagenet_unpack.model import ShardDone, ShardFailed
from imagenet_unpack.reporter import NullReporter
from imagenet_unpack.run.live import Live


class Sums(NullReporter):
    def __init__(self) -> None:
        self.size_bytes = self.images = self.shards = 0
        self.reasons: list[str | None] = []

    def advance(self, *, nbytes: int, images: int, shards: int) -> None:
        self.size_bytes += nbytes
        self.images += images
        self.shards += shards

    def waiting(self, reason: str | None) -> None:
        self.reasons.append(reason)


def word(size_bytes: int, images: int, waiting: str = "") -> Word:
    return Word(size_bytes=size_bytes, images=images, waiting=waiting)


def test_a_board_carries_words_and_goes_away() -> None:
    board = Board.make()
    other = Board(board.path)
    other.write("train/n01440764", word(5, 2, "free spåce"))
    assert board.read("train/n01440764") == word(5, 2, "free spåce")
    assert board.read("train/n01443537") == word(0, 0)
    other.close()
    board.remove()
    assert not os.path.exists(board.path)


def test_a_board_that_is_not_there_is_blank(tmp_path: Path) -> None:
    board = Board(str(tmp_path / "none"))
    board.write("a", word(1, 1))
    assert board.read("a") == word(0, 0)
    board.close()


def test_what_is_told_of_shards_at_work_adds_up() -> None:
    sums = Sums()
    live = Live(sums)
    with live.shown():
        live.watch("train", ["a", "b"])
        worker = Board(live.board.path)
        worker.write("train/a", word(100, 3))
        worker.write("train/b", word(50, 1))
        live.look()
        assert (sums.size_bytes, sums.images, sums.shards) == (150, 4, 0)
        live.done(ShardDone(shard="a", split="train", images=7, size_bytes=900), 1000)
        live.dropped(ShardFailed(shard="b", split="train", kind="archive", message=""))
        live.look()
        worker.close()
    assert (sums.size_bytes, sums.images, sums.shards) == (1000, 7, 1)


def test_waiting_is_told_when_all_wait_and_when_it_is_over() -> None:
    sums = Sums()
    live = Live(sums)
    with live.shown():
        live.watch("val", ["a", "b"])
        worker = Board(live.board.path)
        worker.write("val/a", word(1, 1, "free memory"))
        worker.write("val/b", word(1, 1))
        live.look()
        assert sums.reasons == []
        worker.write("val/b", word(1, 1, "free memory"))
        live.look()
        live.look()
        worker.write("val/a", word(2, 1))
        live.look()
        worker.close()
    assert sums.reasons == ["free memory", None]
