"""A parser whose errors are one line, and how its help looks."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys

from imagenet_unpack.cli import streams
from imagenet_unpack.errors import ExitCode

TYPE_CHECKING = False  # typing is slow to import and nothing here needs it at run time
if TYPE_CHECKING:
    from typing import Any, NoReturn

WIDTH = 80


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Formats help within 80 columns, or the terminal's where that is narrower."""

    def __init__(self, prog: str) -> None:
        try:
            columns = int(os.environ.get("COLUMNS", "")) or os.get_terminal_size().columns
        except (ValueError, OSError):
            columns = WIDTH
        super().__init__(prog, max_help_position=28, width=max(min(columns, WIDTH), 40) - 2)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line that names the help page."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and where the options are described, and exit with 2."""
        text = message.removeprefix("argument ")
        streams.say(f"imagenet_unpack: {text}. See `{self.prog} --help`")
        sys.exit(ExitCode.USAGE)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help and version if they can be printed; until Python 3.11 argparse fails on a closed stream."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            super()._print_message(message, file)

    def shorten_usage(self) -> None:
        """Let the usage name the positional arguments alone."""
        positional = [str(action.metavar) for action in self._actions if not action.option_strings]
        self.usage = " ".join(["%(prog)s [OPTIONS]", *positional])

    def options(self) -> list[str]:
        """Return the long options that the help shows."""
        shown = [action for action in self._actions if action.help is not argparse.SUPPRESS]
        return [option for action in shown for option in action.option_strings if option.startswith("--")]
