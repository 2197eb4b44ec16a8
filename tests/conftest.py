from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from hypothesis import settings
from program import SPEC, tree

from imagenet_unpack.cli import main as cli
from imagenet_unpack.dataset.synth import write_archives

# The same examples each time, so that a failure is of the change at hand; no deadline, as machines are shared.
settings.register_profile("here", deadline=None, derandomize=True)
settings.load_profile("here")

# A test run inside a batch job must not take that job's part, cores or memory for its own.
BATCH_PREFIXES = ("SLURM_", "PBS_", "LSB_", "SGE_")
BATCH_NAMES = ("NSLOTS", "NCPUS", "JOB_ID", "PE_HOSTFILE")


def pytest_xdist_auto_num_workers() -> int:
    """Two more than there are CPUs, as many tests wait: for a process, a signal, a rate."""
    return len(os.sched_getaffinity(0)) + 2


@pytest.fixture(autouse=True)
def _no_batch_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tuple(os.environ):
        if name.startswith(BATCH_PREFIXES) or name in BATCH_NAMES:
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small archives; not to be changed."""
    folder = tmp_path_factory.mktemp("archives")
    write_archives(folder, SPEC)
    return folder


@pytest.fixture(scope="session")
def expected(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The tree that they give."""
    target = tmp_path_factory.mktemp("expected")
    assert cli.main(["--base-dir", str(base), "--target-dir", str(target), "--progress", "none"]) == 0
    return tree(target)


@pytest.fixture(scope="session")
def slurm() -> Iterator[slurm_cluster.Slurm]:
    """A Slurm of four nodes, for all tests of a process."""
    reason = slurm_cluster.missing()
    if reason is not None:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm") as name:
        cluster = slurm_cluster.Slurm(Path(name), nodes=4)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.end()
