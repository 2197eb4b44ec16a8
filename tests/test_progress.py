from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from imagenet_unpack.cli.progress import (
    PROGRESS_KINDS,
    JsonReporter,
    LogReporter,
    ProgressKind,
    make_reporter,
)
from imagenet_unpack.progressbar import ProgressBar
from imagenet_unpack.reporter import NullReporter
from imagenet_unpack.text import TolerantStream, human_bytes, human_time, mute_if_broken

if TYPE_CHECKING:
    from imagenet_unpack.reporter import Reporter

GB = 1_000_000_000


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Broken(io.StringIO):
    """Fails like a pipe whose reader has gone, from the first byte on."""

    def __init__(self, number: int = errno.EPIPE) -> None:
        super().__init__()
        self.number = number
        self.tries = 0

    def write(self, text: str) -> int:
        self.tries += 1
        raise OSError(self.number, os.strerror(self.number))

    def flush(self) -> None:
        raise OSError(self.number, os.strerror(self.number))


def drive(reporter: Reporter) -> None:
    """Every call of the protocol, in the order of a run."""
    reporter.note("before the first phase")
    reporter.phase("extracting", 1000, 10)
    reporter.grow(500)
    reporter.advance(nbytes=700, images=5, shards=1)
    reporter.waiting("memory is short")
    reporter.waiting(None)
    reporter.note("a warning")
    reporter.advance(nbytes=800, images=5, shards=1)
    reporter.phase("publishing train", None, None)
    reporter.advance(nbytes=0, images=0, shards=0)
    reporter.close()
    reporter.note("after the end")
    reporter.close()


def events(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


class TestMakeReporter:
    def test_auto_is_a_bar_on_a_terminal_and_lines_elsewhere(self) -> None:
        assert type(make_reporter("auto", Terminal())) is ProgressBar
        assert type(make_reporter("auto", io.StringIO())) is LogReporter

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [("bar", ProgressBar), ("log", LogReporter), ("json", JsonReporter), ("none", NullReporter)],
    )
    def test_a_named_kind_is_taken_whatever_the_stream(self, kind: ProgressKind, expected: type) -> None:
        assert type(make_reporter(kind, Terminal())) is expected
        assert type(make_reporter(kind, io.StringIO())) is expected

    @pytest.mark.parametrize("kind", PROGRESS_KINDS)
    def test_no_stream_at_all_is_silence(self, kind: ProgressKind) -> None:
        assert type(make_reporter(kind, None)) is NullReporter


@pytest.mark.parametrize("kind", PROGRESS_KINDS)
class TestEveryReporter:
    def test_a_whole_run_only_uses_the_given_stream(
        self, kind: ProgressKind, capfd: pytest.CaptureFixture[str]
    ) -> None:
        stream = io.StringIO()
        drive(make_reporter(kind, stream))
        assert capfd.readouterr() == ("", "")
        assert ("a warning" in stream.getvalue()) is (kind != "none")
        assert ("extracting" in stream.getvalue()) is (kind != "none")

    @pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EAGAIN])
    def test_a_broken_stream_never_ends_the_run(self, kind: ProgressKind, number: int) -> None:
        stream = Broken(number)
        drive(make_reporter(kind, stream))
        assert (stream.tries > 0) is (kind != "none")

    def test_a_closed_stream_never_ends_the_run(self, kind: ProgressKind) -> None:
        stream = io.StringIO()
        stream.close()
        drive(make_reporter(kind, stream))

    def test_a_stream_closed_half_way_never_ends_the_run(self, kind: ProgressKind) -> None:
        stream = Terminal()
        reporter = make_reporter(kind, stream)
        reporter.phase("extracting", 1000, None)
        stream.close()
        reporter.advance(nbytes=500, images=1, shards=1)
        drive(reporter)

    def test_a_name_that_the_encoding_lacks_is_shown_escaped(self, kind: ProgressKind) -> None:
        raw = io.BytesIO()
        reporter = make_reporter(kind, io.TextIOWrapper(raw, encoding="ascii"))
        reporter.note("member 'größe.JPEG'")
        reporter.note("and on")
        if kind != "none":
            assert b"gr\\" in raw.getvalue()
            assert b"and on" in raw.getvalue()

    def test_no_thread_is_left(self, kind: ProgressKind) -> None:
        before = set(threading.enumerate())
        drive(make_reporter(kind, Terminal()))
        assert set(threading.enumerate()) == before


class TestLog:
    def test_lines_come_after_ten_seconds_and_then_at_most_every_ten(self) -> None:
        stream, clock = io.StringIO(), Clock()
        reporter = LogReporter(stream, clock)
        reporter.phase("extracting", 10 * GB, 1000)
        when: list[float] = []
        for step in range(1, 31):
            clock.now_s = 1000.0 + step
            length = len(stream.getvalue())
            reporter.advance(nbytes=GB // 10, images=10, shards=1)
            if len(stream.getvalue()) > length:
                when.append(step)
        assert when == [10, 20, 30]

    def test_a_line_has_share_rates_and_time_left(self) -> None:
        stream, clock = io.StringIO(), Clock()
        reporter = LogReporter(stream, clock)
        reporter.phase("extracting", 10 * GB, 1000)
        clock.now_s += 20
        reporter.advance(nbytes=4 * GB, images=400, shards=4)
        line = stream.getvalue().splitlines()[-1]
        for part in ("40.0 %", "4.0 GB of 10.0 GB", "400 of 1,000 images", "20 images/s", "200.0 MB/s", "ETA 30.0 s"):
            assert part in line

    def test_grow_makes_the_share_smaller(self) -> None:
        stream, clock = io.StringIO(), Clock()
        reporter = LogReporter(stream, clock)
        reporter.phase("extracting", 4 * GB, None)
        reporter.grow(4 * GB)
        clock.now_s += 10
        reporter.advance(nbytes=4 * GB, images=1, shards=1)
        assert "50.0 %" in stream.getvalue()

    def test_a_total_that_was_too_small_gives_no_nonsense(self) -> None:
        stream, clock = io.StringIO(), Clock()
        reporter = LogReporter(stream, clock)
        reporter.phase("extracting", GB, None)
        clock.now_s += 10
        reporter.advance(nbytes=2 * GB, images=1, shards=1)
        assert "100.0 %" in stream.getvalue()
        assert "ETA 0.0 s" in stream.getvalue()

    def test_without_a_total_there_is_no_share_and_no_time_left(self) -> None:
        stream, clock = io.StringIO(), Clock()
        reporter = LogReporter(stream, clock)
        reporter.phase("checking train", None, None)
        clock.now_s += 10
        reporter.advance(nbytes=GB, images=7, shards=0)
        line = stream.getvalue().splitlines()[-1]
        assert "7 images" in line
        assert "%" not in line
        assert "ETA" not in line

    def test_a_short_phase_is_one_line(self) -> None:
        stream, clock = io.StringIO(), Clock()
        reporter = LogReporter(stream, clock)
        for name in ("extracting", "checking train", "publishing train"):
            reporter.phase(name, GB, 10)
            clock.now_s += 9
            reporter.advance(nbytes=GB, images=10, shards=1)
        reporter.close()
        assert len(stream.getvalue().splitlines()) == 3

    def test_the_last_state_of_a_long_phase_is_seen_once(self) -> None:
        stream, clock = io.StringIO(), Clock()
        reporter = LogReporter(stream, clock)
        reporter.phase("extracting", GB, 10)
        clock.now_s += 10
        reporter.advance(nbytes=GB // 2, images=5, shards=1)
        reporter.advance(nbytes=GB // 2, images=5, shards=1)
        reporter.close()
        reporter.close()
        lines = stream.getvalue().splitlines()
        assert len(lines) == 3
        assert "10 of 10 images" in lines[-1]

    def test_a_gate_that_flaps_fills_no_log(self) -> None:
        stream, clock = io.StringIO(), Clock()
        reporter = LogReporter(stream, clock)
        for _ in range(100):
            reporter.waiting("memory is short")
            clock.now_s += 0.01
            reporter.waiting(None)
        assert stream.getvalue().splitlines() == ["waiting: memory is short", "going on"]

    def test_a_reason_that_lasts_is_seen_even_if_it_came_soon_after_another(self) -> None:
        stream, clock = io.StringIO(), Clock()
        reporter = LogReporter(stream, clock)
        reporter.waiting("memory is short")
        for _ in range(12):
            clock.now_s += 1
            reporter.waiting("the target is full")
        assert stream.getvalue().count("the target is full") == 1


class TestJson:
    def test_every_line_is_an_event(self) -> None:
        stream = io.StringIO()
        drive(JsonReporter(stream, Clock()))
        seen = events(stream)
        assert [event["event"] for event in seen] == [
            "note", "phase", "waiting", "waiting", "note", "progress", "phase", "progress", "note",
        ]  # fmt: skip
        assert seen[1] == {"event": "phase", "phase": "extracting", "total_bytes": 1000, "total_images": 10}
        assert [event["reason"] for event in seen if event["event"] == "waiting"] == ["memory is short", None]
        assert seen[4]["message"] == "a warning"
        assert seen[5] == {
            "event": "progress",
            "phase": "extracting",
            "bytes": 1500,
            "total_bytes": 1500,
            "images": 10,
            "total_images": 10,
            "shards": 2,
            "elapsed_s": 0.0,
        }

    def test_progress_comes_at_most_once_a_second_and_at_the_end(self) -> None:
        stream, clock = io.StringIO(), Clock()
        reporter = JsonReporter(stream, clock)
        reporter.phase("extracting", 100, None)
        for _ in range(29):
            clock.now_s += 0.125
            reporter.advance(nbytes=1, images=1, shards=1)
        reporter.close()
        counts = [event["bytes"] for event in events(stream) if event["event"] == "progress"]
        assert counts == [8, 16, 24, 29]

    def test_counts_begin_anew_with_each_phase(self) -> None:
        stream = io.StringIO()
        reporter = JsonReporter(stream, Clock())
        for name in ("checking train", "checking val"):
            reporter.phase(name, None, 3)
            reporter.advance(nbytes=5, images=3, shards=1)
        reporter.close()
        progress = [event for event in events(stream) if event["event"] == "progress"]
        assert [(event["phase"], event["images"]) for event in progress] == [("checking train", 3), ("checking val", 3)]

    def test_a_note_is_one_line_whatever_it_holds(self) -> None:
        stream = io.StringIO()
        JsonReporter(stream).note("two\nlines and \udcff")
        assert [event["message"] for event in events(stream)] == ["two\nlines and \udcff"]


def bar(stream: io.StringIO, clock: Clock | None = None) -> ProgressBar:
    return ProgressBar(tqdm, stream, clock or Clock())


class TestBar:
    def test_it_shows_bytes_and_images_a_second(self) -> None:
        stream, clock = Terminal(), Clock()
        reporter = bar(stream, clock)
        reporter.phase("extracting", 2 * GB, 20)
        clock.now_s += 2
        reporter.advance(nbytes=GB, images=3000, shards=1)
        reporter.close()
        last = stream.getvalue().split("\r")[-1]
        assert "extracting" in last
        assert "50%" in last
        assert "1,500 images/s" in last

    def test_grow_changes_the_total(self) -> None:
        stream = Terminal()
        reporter = bar(stream)
        reporter.phase("extracting", GB, None)
        reporter.grow(3 * GB)
        reporter.advance(nbytes=GB, images=1, shards=1)
        reporter.close()
        assert "25%" in stream.getvalue().split("\r")[-1]

    def test_a_note_does_not_tear_the_bar(self) -> None:
        stream = Terminal()
        reporter = bar(stream)
        reporter.phase("extracting", GB, None)
        reporter.note("a warning")
        # The line stands alone: the bar before it was wiped, the bar after it begins anew.
        before, after = stream.getvalue().split("a warning\n")
        assert before.split("\r")[-1].strip() == ""
        assert before.endswith("\r")
        assert "extracting" in after
        reporter.close()

    def test_the_reason_for_waiting_comes_and_goes(self) -> None:
        stream = Terminal()
        reporter = bar(stream)
        reporter.phase("extracting", GB, None)
        reporter.waiting("memory is short")
        assert "memory is short" in stream.getvalue().split("\r")[-1]
        reporter.waiting(None)
        assert "memory is short" not in stream.getvalue().split("\r")[-1]
        reporter.close()

    def test_a_phase_that_counted_nothing_leaves_nothing(self) -> None:
        stream = Terminal()
        reporter = bar(stream)
        reporter.phase("publishing train", None, None)
        reporter.close()
        assert "\n" not in stream.getvalue()


class TestText:
    @pytest.mark.parametrize(
        ("size_bytes", "text"),
        [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (999_949, "999.9 kB"),
            (999_999, "1.0 MB"),
            (6_000_000_000, "6.0 GB"),
            (147_897_477_120, "147.9 GB"),
            (10**20, "100000.0 PB"),
        ],
    )
    def test_human_bytes(self, size_bytes: int, text: str) -> None:
        assert human_bytes(size_bytes) == text

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (0, "0.0 s"),
            (-3, "0.0 s"),
            (8.14, "8.1 s"),
            (59.97, "1 min 00 s"),
            (125, "2 min 05 s"),
            (3599.6, "1 h 00 min"),
            (3 * 3600 + 20 * 60, "3 h 20 min"),
            (86399, "1 d 0 h"),
            (2 * 86400 + 4 * 3600, "2 d 4 h"),
            (float("inf"), "?"),
            (float("nan"), "?"),
        ],
    )
    def test_human_time(self, seconds: float, text: str) -> None:
        assert human_time(seconds) == text

    @given(st.integers(min_value=0, max_value=10**15))
    def test_human_bytes_is_near_and_short(self, size_bytes: int) -> None:
        number, unit = human_bytes(size_bytes).split()
        assert float(number) < 1000 or unit == "PB"
        factor = 1000 ** ("B", "kB", "MB", "GB", "TB", "PB").index(unit)
        assert abs(float(number) * factor - size_bytes) <= 0.0501 * factor

    def test_a_stream_that_recovers_is_written_to_again(self) -> None:
        inner = Broken(errno.ENOSPC)
        stream = TolerantStream(inner)
        stream.write("lost")
        stream.write("lost too")
        assert inner.tries == 2

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
    @pytest.mark.parametrize("name", ["stdout", "stderr"])
    def test_a_full_disk_under_the_output_does_not_change_the_exit_code(self, name: str) -> None:
        code = (
            "import sys; from imagenet_unpack.text import TolerantStream, mute_if_broken\n"
            f"TolerantStream(sys.{name}).write('some text')\n"
            f"mute_if_broken(sys.{name}); sys.exit(6)"
        )
        # Unbuffered output has nothing left to fail with at the end: the fault would not show.
        env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
        with open("/dev/full", "w", encoding="utf-8") as full:
            ended = subprocess.run(
                [sys.executable, "-c", code],
                env=env,
                check=False,
                timeout=60,
                stdout=full if name == "stdout" else subprocess.DEVNULL,
                stderr=full if name == "stderr" else subprocess.DEVNULL,
            )
        assert ended.returncode == 6

    def test_a_whole_stream_is_left_as_it_is(self) -> None:
        read_fd, write_fd = os.pipe()
        with open(read_fd, encoding="utf-8") as reader, open(write_fd, "w", encoding="utf-8") as writer:
            writer.write("kept")
            mute_if_broken(writer)
            writer.write(" and more")
            writer.close()
            mute_if_broken(writer)
            mute_if_broken(None)
            assert reader.read() == "kept and more"
