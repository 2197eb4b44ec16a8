from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from imagenet_unpack.extract import throttle
from imagenet_unpack.extract.throttle import Gate, Limits, RateLimiter, Sample, StalledError, decide

GB = 1 << 30
LIMITS = Limits(free_space=GB, free_memory=GB // 2, stall_timeout_s=10)


class Time:
    """A clock that moves when somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.mark.parametrize(
    ("space", "memory", "word"),
    [(GB, GB // 2, None), (GB - 1, GB, "space"), (GB, GB // 2 - 1, "memory"), (0, 0, "space")],
)
def test_decide(space: int, memory: int, word: str | None) -> None:
    reason = decide(LIMITS, Sample(free_space=space, free_memory=memory))
    assert (reason is None) if word is None else (reason is not None and word in reason)


def test_no_limits_never_wait_and_never_look() -> None:
    def look() -> Sample:
        raise AssertionError

    Gate(Limits(), look).wait()


class TestGate:
    def gate(
        self, free: Callable[[float], tuple[int, int]], limits: Limits = LIMITS
    ) -> tuple[Gate, Time, list[object]]:
        moment = Time()
        told: list[object] = []

        def look() -> Sample:
            space, memory = free(moment.now_s - 100)
            return Sample(free_space=space, free_memory=memory)

        gate = Gate(
            limits, look, relieve=lambda: told.append("relieved"), shown=told.append, clock=moment.clock,
            sleep=moment.sleep,
        )  # fmt: skip
        return gate, moment, told

    def test_open(self) -> None:
        gate, moment, told = self.gate(lambda _: (2 * GB, GB))
        gate.wait()
        assert moment.now_s == 100
        assert told == []

    def test_waits_until_there_is_room_and_says_for_what(self) -> None:
        gate, moment, told = self.gate(lambda s: (2 * GB if s >= 3 else 0, GB))
        gate.wait()
        assert moment.now_s == pytest.approx(103, abs=throttle.WAIT_LOOK_S)
        assert "free space" in str(told[0])
        assert told[-1] is None
        assert "relieved" not in told

    def test_short_memory_is_relieved(self) -> None:
        gate, _, told = self.gate(lambda s: (2 * GB, GB if s >= 2 else 0))
        gate.wait()
        assert "relieved" in told

    def test_stalls(self) -> None:
        gate, moment, _ = self.gate(lambda _: (0, GB))
        with pytest.raises(StalledError, match="free space"):
            gate.wait()
        assert moment.now_s == pytest.approx(110, abs=throttle.WAIT_LOOK_S)

    def test_looks_now_and_then_only(self) -> None:
        looks: list[float] = []

        def free(at: float) -> tuple[int, int]:
            looks.append(at)
            return 2 * GB, GB

        gate, moment, _ = self.gate(free)
        for _ in range(100):
            gate.wait()
            moment.sleep(throttle.GATE_LOOK_S / 10)
        assert 9 <= len(looks) <= 11


@pytest.mark.parametrize(
    ("total", "free", "needed", "mark"),
    [
        (10_000 * GB, 9000 * GB, 154 * GB, GB),
        (10 * GB, 9 * GB, GB, 10 * GB // 20),
        (10 * GB, 2 * GB, 2 * GB, 0),
        (10 * GB, GB, 2 * GB, 0),
    ],
)
def test_the_default_mark_fits_the_file_system(total: int, free: int, needed: int, mark: int) -> None:
    assert throttle.default_free_space(total, free, needed) == mark


def test_the_default_mark_fits_the_memory() -> None:
    assert throttle.default_free_memory(64 * GB) == throttle.DEFAULT_FREE_MEMORY
    assert throttle.default_free_memory(256 << 20) < 32 << 20


def test_pieces_are_small_where_the_rate_is() -> None:
    assert Limits().window_bytes == 8 << 20
    assert Limits(read_rate=50e6).window_bytes <= 50e6 / 8
    assert Limits(read_rate=1e9, write_rate=4e6).window_bytes <= 4e6 / 8
    assert all(Limits(read_rate=rate).window_bytes % 512 == 0 for rate in (1.0, 1e5, 12_345_678.0))


def taker(folder: str, rate: float, amount: float, seconds: float, out: multiprocessing.SimpleQueue[float]) -> None:
    limiter = RateLimiter("write", rate, folder=Path(folder))
    taken, end_s = 0.0, time.monotonic() + seconds
    while time.monotonic() < end_s:
        limiter.take(amount)
        taken += amount
    out.put(taken)


def take_in(folder: Path, processes: int, rate: float, amount: float, seconds: float) -> float:
    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    arguments = (str(folder), rate, amount, seconds, out)
    workers = [context.Process(target=taker, args=arguments) for _ in range(processes)]
    for worker in workers:
        worker.start()
    total: float = sum(out.get() for _ in workers)
    for worker in workers:
        worker.join()
    return total


@pytest.mark.parametrize("processes", [1, 4])
def test_the_rate_is_shared_by_processes(tmp_path: Path, processes: int) -> None:
    rate, seconds, amount = 50e6, 1.0, 110e3
    for _ in range(3):  # a busy machine may wake the takers late, but never lets them take more
        began_s = time.monotonic()
        total = take_in(tmp_path, processes, rate, amount, seconds)
        elapsed_s = time.monotonic() - began_s
        # Until the end of the time all is in turn; what each took last is paid for behind it.
        assert total <= rate * (elapsed_s + throttle._BURST_S) + processes * rate * 0.01
        if total >= rate * seconds * 0.93:
            break
    else:
        pytest.fail("three times less than the rate allows")


def test_no_burst_after_a_pause(tmp_path: Path) -> None:
    limiter = RateLimiter("create", 1000, folder=tmp_path)
    limiter.take(1)
    time.sleep(0.5)
    began_s, taken = time.monotonic(), 0
    while time.monotonic() - began_s < 0.2:
        limiter.take(1)
        taken += 1
    assert taken <= 1000 * (0.2 + throttle._BURST_S) + 20


def test_a_taker_that_dies_takes_neither_lock_nor_tokens(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    victims = [context.Process(target=taker, args=(str(tmp_path), 2000, 1, 60, out)) for _ in range(4)]
    for victim in victims:
        victim.start()
    time.sleep(0.3)
    for victim in victims:
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
    began_s = time.monotonic()
    limiter = RateLimiter("write", 2000, folder=tmp_path)
    for _ in range(1000):
        limiter.take(1)
    assert 0.5 - throttle._BURST_S <= time.monotonic() - began_s < 5  # a taker has 60 s to take its share in


def test_kinds_are_apart_and_a_time_of_an_earlier_boot_is_forgotten(tmp_path: Path) -> None:
    RateLimiter("read", 1e-3, folder=tmp_path)._reserve(10)  # due in 10,000 s
    began_s = time.monotonic()
    RateLimiter("write", 1000, folder=tmp_path).take(1)
    RateLimiter("read", 1000, folder=tmp_path).take(1)
    assert time.monotonic() - began_s < 0.5
