from __future__ import annotations

import io
import itertools
import math
import os

import pytest
from PIL import Image

from imagenet_unpack.dataset import jpeg

CORNERS = [(red, green, blue) for red in (0, 255) for green in (0, 255) for blue in (0, 255)]


def written(colour: jpeg.Colour, size_bytes: int) -> bytes:
    return b"".join(jpeg.flat_jpeg(colour, size_bytes, os.urandom))


def decoded(data: bytes) -> jpeg.Colour:
    """The one colour of the picture, by a decoder that is not ours."""
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "JPEG"
        assert image.mode == "RGB"
        colours = image.getcolors()
    assert colours is not None
    ((_, colour),) = colours
    red, green, blue = colour
    return red, green, blue


def test_every_class_has_its_colour() -> None:
    for index in range(1000):
        colour = jpeg.class_colour(index)
        assert math.dist(decoded(written(colour, jpeg.SMALLEST_BYTES)), colour) <= 3


@pytest.mark.parametrize("colour", CORNERS)
def test_the_extreme_colours(colour: jpeg.Colour) -> None:
    assert math.dist(decoded(written(colour, jpeg.SMALLEST_BYTES)), colour) <= 3


@pytest.mark.parametrize("size", [*range(160, 170), 65_680, *range(65_685, 65_700), 131_230, 400_000])
def test_any_size(size: int) -> None:
    data = written((84, 140, 28), size)
    assert len(data) == size
    assert data.startswith(b"\xff\xd8\xff")
    assert data.endswith(b"\xff\xd9")
    assert math.dist(decoded(data), (84, 140, 28)) <= 3


@pytest.mark.parametrize(("classes", "apart"), [(10, 120), (20, 80), (100, 40), (1000, 28)])
def test_classes_are_told_apart(classes: int, apart: float) -> None:
    colours = [jpeg.class_colour(index) for index in range(classes)]
    assert min(math.dist(one, other) for one, other in itertools.combinations(colours, 2)) >= apart
