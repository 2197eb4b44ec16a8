from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from imagenet_unpack.cli import main as cli
from imagenet_unpack.run.timeline import POINTS, Timeline
from imagenet_unpack.targets.paths import state_folder, timeline_file


class Clock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def target(tmp_path: Path) -> Path:
    state_folder(tmp_path).mkdir()
    return tmp_path


def saved(target: Path) -> dict[str, Any]:
    value = json.loads(timeline_file(target).read_text())
    assert isinstance(value, dict)
    return value


def test_a_point_a_second_and_each_wait(target: Path) -> None:
    clock = Clock()
    timeline = Timeline(clock=clock, wall_clock=lambda: 1_700_000_000)
    for _ in range(25):
        clock.now_s += 0.1
        timeline.advance(10, 1)
    timeline.waiting("free space")
    clock.now_s += 7
    timeline.waiting(None)
    timeline.save(target, 4)
    value = saved(target)
    assert (value["began"], value["workers"]) == (1_700_000_000, 4)
    points = value["points"]
    assert points[0][1:3] == [0, 0]
    assert points[-1][1:3] == [25, 250]
    assert [point[0] for point in points] == sorted(point[0] for point in points)
    assert len(points) <= 8
    (wait,) = (point for point in points if point[3])
    after = points[points.index(wait) + 1]
    assert after[0] - wait[0] == pytest.approx(7)


def test_a_long_run_is_bounded(target: Path) -> None:
    clock = Clock()
    timeline = Timeline(clock=clock)
    for second in range(20_000):
        clock.now_s += 1
        if second % 100 == 0:
            timeline.waiting("memory" if second % 200 else None)
        timeline.advance(10, 1)
    timeline.save(target, 1)
    points = saved(target)["points"]
    assert POINTS / 3 < len(points) <= POINTS
    assert points[-1][1] == 20_000
    assert max(after[0] - before[0] for before, after in pairwise(points)) < 20_000 / len(points) * 4


def test_a_run_that_extracts_nothing_leaves_the_last_ones_log(tmp_path: Path, base: Path) -> None:
    command = ["--base-dir", str(base), "--target-dir", str(tmp_path), "--progress", "none", "--executor", "serial"]
    assert cli.main([*command, "--splits", "val"]) == 0
    first = saved(tmp_path)
    assert first["points"][-1][1] == 60
    assert cli.main([*command, "--splits", "val"]) == 0
    assert saved(tmp_path) == first
    assert cli.main(command) == 0
    assert saved(tmp_path)["points"][-1][1] == 240
