"""The signals that end a run in good order, and what messages call them."""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def stopped_by(number: int) -> str:
    """Say which signal ended the program."""
    name = signal.Signals(number).name
    return f"stopped by {f'Ctrl-C ({name})' if number == signal.SIGINT else name}"
