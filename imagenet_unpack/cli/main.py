"""Entry point: parse the command line, run its command, return the exit code."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module

from imagenet_unpack.cli import streams
from imagenet_unpack.cli.arguments import parse, with_default_command
from imagenet_unpack.errors import ExitCode, UnpackError, named_os_errors

# How long a command may clean up after a signal: those that write files of their own remove them first.
_GRACE_S = {"tune": 6.0, "demo": 6.0}
_USUAL_GRACE_S = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    streams.escape_unencodable()
    try:
        args = parse(with_default_command(sys.argv[1:] if argv is None else argv))
        _configure_logging()
        return run_command(args)
    finally:
        streams.finish()


def run_command(args: argparse.Namespace) -> int:
    """Run a parsed command; a known error becomes one line, a defect a traceback."""
    _prepare_workers(args)
    from imagenet_unpack.cli import output, signals  # noqa: PLC0415 - not for `--help`
    from imagenet_unpack.host.signals import stopped_by  # noqa: PLC0415 - likewise

    args.began_s = time.monotonic()

    def report(number: int) -> int:
        code = 128 + number
        streams.say(f"imagenet_unpack: {stopped_by(number)}")
        _emit_failure(args, output.interrupted_object(args, code))
        return code

    def leave(number: int) -> None:
        os._exit(report(number))

    try:
        with signals.interrupt(leave, grace_s=_GRACE_S.get(args.command, _USUAL_GRACE_S)), named_os_errors():
            return int(import_module(f"imagenet_unpack.cli.commands.{args.command}").run(args))
    except streams.OutputError as error:
        streams.say(f"imagenet_unpack: {error}")
        return error.exit_code
    except UnpackError as error:
        streams.say(f"imagenet_unpack: {error}")
        _emit_failure(args, output.failure_object(args, error))
        return error.exit_code
    except signals.Interrupted as interrupted:
        return report(interrupted.number)
    except Exception:  # noqa: BLE001 - the edge: a defect becomes a traceback and a code
        import traceback  # noqa: PLC0415 - not for `--help`

        for line in traceback.format_exc().splitlines():
            streams.say(line)
        streams.say("imagenet_unpack: this is a defect of the program: please report it with the lines above")
        return ExitCode.DEFECT


def _prepare_workers(args: argparse.Namespace) -> None:
    """Have the workers' fork server import what it needs beside this process: the first image waits for both."""
    if args.command in ("unpack", "image") and getattr(args, "executor", "local") == "local":
        from imagenet_unpack.host.pool import start_server  # noqa: PLC0415 - not for `--help`
        from imagenet_unpack.run.executors import WORKER_MODULE  # noqa: PLC0415 - likewise

        start_server(WORKER_MODULE)


def _emit_failure(args: argparse.Namespace, text: str) -> None:
    """Write the JSON object of a command that failed, if it was asked for and can be written."""
    if text and getattr(args, "json", False):
        try:
            streams.emit(text)
        except streams.OutputError as error:
            streams.say(f"imagenet_unpack: {error}")


def _configure_logging() -> None:
    """Show this program's own warnings; what libraries log is reported in this program's own messages."""
    import logging  # noqa: PLC0415 - not for `--help`

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("imagenet_unpack: %(message)s"))
    logging.getLogger("imagenet_unpack").handlers = [handler]
    logging.getLogger("imagenet_unpack").propagate = False
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(logging.NullHandler())
