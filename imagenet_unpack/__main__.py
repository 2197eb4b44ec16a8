"""`python -m imagenet_unpack`."""

from __future__ import annotations

import signal
import sys

from imagenet_unpack.host.signals import SIGNALS


def main() -> int:
    """Run the program and return its exit code.

    Signals wait until a command takes them: in the middle of an import they would end in a traceback.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    from imagenet_unpack.cli.main import main as run  # noqa: PLC0415 - see above

    return run()


if __name__ == "__main__":
    sys.exit(main())
