from __future__ import annotations

import os

import pytest
from hypothesis import settings

# The same examples each time, so that a failure is of the change at hand; no deadline, as machines are shared.
settings.register_profile("here", deadline=None, derandomize=True)
settings.load_profile("here")

# A test run inside a batch job must not take that job's part, cores or memory for its own.
BATCH_PREFIXES = ("SLURM_", "PBS_", "LSB_", "SGE_")
BATCH_NAMES = ("NSLOTS", "NCPUS", "JOB_ID", "PE_HOSTFILE")


@pytest.fixture(autouse=True)
def _no_batch_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tuple(os.environ):
        if name.startswith(BATCH_PREFIXES) or name in BATCH_NAMES:
            monkeypatch.delenv(name)
