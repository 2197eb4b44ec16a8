"""The smallest JPEG files: 8 x 8 pixels of one colour, made to any size by comment segments.

Formats: ITU-T T.81 (baseline sequential DCT: annexes B and F), https://www.w3.org/Graphics/JPEG/itu-t81.pdf, and the
colour space of JFIF (ITU-T T.871), which decoders assume for components 1, 2 and 3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

Colour = tuple[int, int, int]

SMALLEST_BYTES = 160
"""Every colour can be written in a file of this size and of any larger one."""

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_COMMENT = b"\xff\xfe"
_COMMENT_HEAD_BYTES = 4
_COMMENT_BYTES = 65_533  # the two bytes of the length count themselves
_LEVELS, _LEVEL_STEP = 10, 28
# Coprime with 1000; of these, one of those that keep the first few classes furthest apart.
_SPREAD = 471
_QUANT = 8  # an 8 x 8 block of the level v has the DC coefficient 8 (v - 128): this divisor makes it v - 128


def class_colour(class_index: int) -> Colour:
    """Return a colour (R, G, B from 0 to 252) for each class from 0 to 999.

    Two classes differ by at least 28 in one of the channels; neighbours in the order of the classes, and the first
    few classes, by far more.
    """
    place = class_index * _SPREAD % _LEVELS**3
    red, rest = divmod(place, _LEVELS**2)
    green, blue = divmod(rest, _LEVELS)
    return red * _LEVEL_STEP, green * _LEVEL_STEP, blue * _LEVEL_STEP


def flat_jpeg(
    colour: Colour, size_bytes: int, filler: Callable[[int], bytes | memoryview]
) -> Iterator[bytes | memoryview]:
    """Yield the pieces of a JPEG of one colour that is `size_bytes` long.

    Decoders show the colour to within 2 of 255 in each channel.

    Args:
        colour: red, green and blue, 0 to 255.
        size_bytes: at least `SMALLEST_BYTES`.
        filler: returns the given number of bytes to fill the comments.
    """
    tail = _tables_and_scan(colour)
    left = size_bytes - len(_SOI) - len(tail)
    yield _SOI
    while left >= _COMMENT_HEAD_BYTES:
        length = min(left - _COMMENT_HEAD_BYTES, _COMMENT_BYTES)
        yield _COMMENT + (length + 2).to_bytes(2, "big")
        yield filler(length)
        left -= _COMMENT_HEAD_BYTES + length
    # Too few bytes for a segment: any number of 0xff may stand before a marker (T.81, B.1.1.2).
    yield b"\xff" * left + tail


@functools.cache
def _tables_and_scan(colour: Colour) -> bytes:
    """Return all that follows the comments: DQT, SOF0, DHT, SOS, the only scan, EOI."""
    levels = [level - 128 for level in _ycbcr(colour)]
    categories = sorted({_category(level) for level in levels})
    # Codes of two bits for the DC categories (three at most, as no code may be all ones), one bit for AC's only
    # symbol, the end of the block.
    bits = "".join(f"{categories.index(_category(level)):02b}{_magnitude(level)}0" for level in levels)
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    dc_table = bytes([0x00, 0, len(categories), *[0] * 14, *categories])
    ac_table = bytes([0x10, 1, *[0] * 15, 0x00])
    components = (1, 2, 3)
    return b"".join(
        (
            _segment(0xDB, bytes([0, *[_QUANT] * 64])),
            _segment(0xC0, bytes([8, 0, 8, 0, 8, 3, *(value for each in components for value in (each, 0x11, 0))])),
            _segment(0xC4, dc_table + ac_table),
            _segment(0xDA, bytes([3, *(value for each in components for value in (each, 0x00)), 0, 63, 0])),
            scan,
            _EOI,
        )
    )


def _segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def _category(level: int) -> int:
    return abs(level).bit_length()


def _magnitude(level: int) -> str:
    """Return the bits that follow the code of the category; of a negative level the complement (T.81, F.1.2.1)."""
    category = _category(level)
    return format(level if level >= 0 else level + (1 << category) - 1, f"0{category}b") if category else ""


def _ycbcr(colour: Colour) -> tuple[int, int, int]:
    red, green, blue = colour
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    values = (luma, 128 + (blue - luma) / 1.772, 128 + (red - luma) / 1.402)
    first, second, third = (min(max(round(value), 0), 255) for value in values)
    return first, second, third
