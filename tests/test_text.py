from __future__ import annotations

import math

import pytest

from imagenet_unpack.text import human_bytes, human_time


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"), (6e9, "6.0 GB"),
     (147_897_477_120, "147.9 GB"), (3e18, "3000.0 PB")],
)  # fmt: skip
def test_bytes(value: float, text: str) -> None:
    assert human_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.0 s"), (-3, "0.0 s"), (8.14, "8.1 s"), (59.97, "1 min 00 s"), (125, "2 min 05 s"), (3599.6, "1 h 00 min"),
     (12_000, "3 h 20 min"), (187_200, "2 d 4 h"), (math.inf, "?"), (math.nan, "?")],
)  # fmt: skip
def test_time(value: float, text: str) -> None:
    assert human_time(value) == text
