from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = str(Path(__file__).parents[1])


@pytest.mark.parametrize("delay_s", [0.08, 0.15, 0.25, 0.4])
def test_a_signal_while_the_program_is_imported_is_no_traceback(tmp_path: Path, delay_s: float) -> None:
    """Whatever it does at that moment: it has not written anything yet, or it ends in order."""
    command = [sys.executable, "-m", "imagenet_unpack", "tune", "--base-dir", str(tmp_path), "--json"]
    environ = {**os.environ, "PYTHONPATH": PACKAGE}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as process:
        time.sleep(delay_s)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
    assert process.returncode in (143, 5, -signal.SIGTERM)  # 5: it was faster; -15: Python itself was not ready yet
    assert "Traceback" not in err
