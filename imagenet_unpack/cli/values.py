"""Values of command-line options: from text to numbers, sizes, times, paths, parts and splits.

Each function raises `argparse.ArgumentTypeError` with a message that shows valid values.
"""

from __future__ import annotations

import argparse
import math
import re

# Imported where a value is made: `--help` needs none of it and stays fast.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from imagenet_unpack.model import Part, SplitName


def path(text: str) -> Path:
    """Read a path; an empty one comes from an unset variable in a script and is refused."""
    from pathlib import Path  # noqa: PLC0415 - see above

    if not text:
        raise argparse.ArgumentTypeError("the path is empty (an unset variable?)")
    return Path(text)


def positive(text: str) -> int:
    """Read a whole number from 1 on."""
    value = count(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def count(text: str) -> int:
    """Read a whole number from 0 on."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def numbers(text: str) -> tuple[int, ...]:
    """Read `1,4,16`."""
    try:
        return tuple(positive(number) for number in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers separated by commas, such as 1,4,16") from None


def workers(text: str) -> int | None:
    """Read a number of workers; `auto` is None."""
    return None if text == "auto" else positive(text)


def size_bytes(text: str) -> int:
    """Read `512M`, `2GiB` or `50MB` as dd does: `M` and `MiB` are 2**20, `MB` is 10**6.

    Raises:
        ValueError: it is not a size.
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*(?:([KMGTP])(i?B)?|B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(text)
    power = 1 + "KMGTP".index(match[2].upper()) if match[2] else 0
    return int(float(match[1]) * (1000 if (match[3] or "").upper() == "B" else 1024) ** power)


def rate(text: str) -> float:
    """Read a rate per second, such as `500`, `50MB` or `1GiB/s`."""
    try:
        value = size_bytes(text.removesuffix("/s"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid rate {text!r}: use 500, 50MB or 1GiB") from None
    if value == 0:
        raise argparse.ArgumentTypeError("must be more than 0; leave the option out for no limit")
    return float(value)


def amount(text: str) -> int | float:
    """Read a size in bytes as an int, or a percentage as a fraction."""
    share = re.fullmatch(r"([0-9]{1,2}(?:\.[0-9]{1,3})?)%", text.strip())
    if share:
        return float(share[1]) / 100
    try:
        return size_bytes(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid size {text!r}: use 512M, 2GiB or 5%") from None


def seconds(text: str) -> float:
    """Read `90`, `90s`, `5m` or `1h`."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    try:
        value = float(text[:-1] if unit else text) * (unit or 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"invalid time {text!r}: use 90, 90s, 5m or 1h")
    return value


def part(text: str) -> Part | str:
    """Read `I/N` with I from 0 to N-1; `auto` stays as it is, for `batch.part_of`."""
    from imagenet_unpack.model import Part  # noqa: PLC0415 - see above

    if text == "auto":
        return text
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text, re.ASCII)
    if match is None or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"invalid part {text!r}: use I/N with I from 0 to N-1, or auto")
    return Part(index=int(match[1]), count=int(match[2]))


def splits(text: str) -> tuple[SplitName, ...]:
    """Read `train`, `val` or `train,val`."""
    from imagenet_unpack.model import SPLITS  # noqa: PLC0415 - see above

    names = text.split(",")
    unknown = [name for name in names if name not in SPLITS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown split {unknown[0]!r}: use {', '.join(SPLITS)} or a list of them")
    return tuple(split for split in SPLITS if split in names)
