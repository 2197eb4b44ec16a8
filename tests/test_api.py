"""The Python interface: what it returns and raises, that it prints nothing, and that its import is cheap."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import imagenet_unpack
from imagenet_unpack import errors
from imagenet_unpack.dataset.synth import SynthSpec, write_archives
from imagenet_unpack.reporter import NullReporter

SPEC = SynthSpec(classes=4, images_per_class=5, val_images=12, mean_bytes=2000)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    write_archives(folder, SPEC)
    return folder


class Recorder(NullReporter):
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.images = 0
        self.closed = 0

    def phase(self, name: str, total_bytes: int | None, total_images: int | None) -> None:
        self.phases.append(name)

    def advance(self, *, nbytes: int, images: int, shards: int) -> None:
        self.images += images

    def close(self) -> None:
        self.closed += 1


def test_unpack_plan_and_check(archives: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = imagenet_unpack.plan(base_dir=archives, target_dir=tmp_path, splits=("val",))
    assert plan.splits["val"].images == 12
    assert plan.fits
    recorder = Recorder()
    result = imagenet_unpack.unpack(base_dir=archives, target_dir=tmp_path, workers=2, progress=recorder)
    assert result.exit_code == 0
    assert {name: split.images for name, split in result.splits.items()} == {"train": 20, "val": 12}
    assert "extracting" in recorder.phases
    assert recorder.closed == 1
    found = imagenet_unpack.check(tmp_path, deep=True)
    assert found.ok
    next((tmp_path / "train" / "2").iterdir()).unlink()
    damaged = imagenet_unpack.check(str(tmp_path))
    assert not damaged.ok
    assert [problem.kind for problem in damaged.splits["train"].problems] == ["missing"]
    assert capfd.readouterr() == ("", "")


def test_arguments_have_the_types_of_python(archives: Path, tmp_path: Path) -> None:
    result = imagenet_unpack.unpack(
        base_dir=str(archives), target_dir=str(tmp_path), splits=["train"], classes=range(1, 3), layout="wnid",
        executor="serial", min_free_space=0, min_free_memory=0.01,
    )  # fmt: skip
    assert result.splits["train"].classes == 2
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == ["n01443537", "n01484850"]
    more = imagenet_unpack.unpack(base_dir=archives, target_dir=tmp_path, splits=["train"], classes=[3, "n01440764"],
        layout="wnid", executor="serial")  # fmt: skip
    assert more.splits["train"].classes == 4


def test_parts(archives: Path, tmp_path: Path) -> None:
    for index in (0, 1):
        part = imagenet_unpack.unpack(base_dir=archives, target_dir=tmp_path, part=(index, 2), executor="serial")
        assert part.splits["train"].status == "incomplete"
    assert imagenet_unpack.unpack(base_dir=archives, target_dir=tmp_path).splits["train"].status == "published"


class TestErrors:
    def test_a_missing_archive(self, tmp_path: Path) -> None:
        with pytest.raises(errors.ArchiveError, match=r"ILSVRC2012_img_train\.tar"):
            imagenet_unpack.unpack(base_dir=tmp_path)
        with pytest.raises(errors.ArchiveError):
            imagenet_unpack.plan(base_dir=tmp_path)
        with pytest.raises(errors.TargetError):
            imagenet_unpack.check(tmp_path)

    @pytest.mark.parametrize(
        "arguments",
        [
            {"base_dir": ""},
            {"target_dir": ""},
            {"source": ""},
            {"splits": ["dev"]},
            {"splits": ()},
            {"layout": "names"},
            {"executor": "threads"},
            {"verify_archives": "md5"},
            {"workers": 0},
            {"part": (2, 2)},
            {"max_write_rate": -1},
            {"stall_timeout": float("nan")},
            {"min_free_space": -1},
        ],
    )
    def test_a_wrong_value(self, arguments: dict[str, object]) -> None:
        with pytest.raises(errors.UsageError):
            imagenet_unpack.unpack(**arguments)  # type: ignore[arg-type]

    def test_a_run_that_is_not_complete_is_an_error_with_its_summary(self, archives: Path, tmp_path: Path) -> None:
        base = tmp_path / "base"
        base.mkdir()
        for path in archives.iterdir():
            (base / path.name).write_bytes(path.read_bytes())
        with open(base / "ILSVRC2012_img_train.tar", "r+b") as file:
            file.seek(600)  # the first header of the first inner tar
            file.write(b"\0damage\0")
        with pytest.raises(errors.ShardsFailedError) as caught:
            imagenet_unpack.unpack(base_dir=base, target_dir=tmp_path / "tree", executor="serial")
        summary = caught.value.summary
        assert summary is not None
        assert summary.splits["train"].status == "failed"
        assert summary.splits["val"].status == "published"
        copied = pickle.loads(pickle.dumps(caught.value))
        assert copied.summary == summary


INTERRUPTED = """
import os, signal, sys, threading
import imagenet_unpack
from imagenet_unpack.reporter import NullReporter

class Reporter(NullReporter):
    def phase(self, name, total_bytes, total_images):
        if name == "extracting":
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()

before = signal.getsignal(signal.SIGINT)
call = dict(base_dir=sys.argv[1], target_dir=sys.argv[2], workers=2, max_write_rate=40_000, rate_dir=sys.argv[3])
try:
    imagenet_unpack.unpack(**call, progress=Reporter())
except KeyboardInterrupt:
    print("interrupted")
assert signal.getsignal(signal.SIGINT) is before
del call["max_write_rate"], call["rate_dir"]
result = imagenet_unpack.unpack(**call)
print(int(result.exit_code))
"""


def test_ctrl_c_stops_in_good_order_and_the_same_call_continues(archives: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, archives, tmp_path / "tree", tmp_path],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.split() == ["interrupted", "0"]


def test_a_run_in_another_thread(archives: Path, tmp_path: Path) -> None:
    code = (
        "import sys, threading, imagenet_unpack\n"
        "done = []\n"
        "def work(): done.append(imagenet_unpack.unpack(base_dir=sys.argv[1], target_dir=sys.argv[2], workers=2))\n"
        "thread = threading.Thread(target=work); thread.start(); thread.join()\n"
        "print(int(done[0].exit_code))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, archives, tmp_path / "tree"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.stdout.strip(), done.stderr) == ("0", "")


class TestImport:
    def test_is_cheap_and_pulls_in_no_dependency(self) -> None:
        code = (
            "import sys, imagenet_unpack\n"
            "print({'joblib', 'psutil', 'tqdm', 'xxhash', 'numpy', 'dataclasses', 'typing'} & set(sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "set()"

    def test_help_shows_the_functions(self) -> None:
        code = "import imagenet_unpack; help(imagenet_unpack)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for name in ("unpack(", "plan(", "check(", "target_dir"):
            assert name in done.stdout

    def test_every_public_name_is_there_and_documented(self) -> None:
        for name in imagenet_unpack.__all__:
            assert inspect.getdoc(getattr(imagenet_unpack, name)), name
        assert set(imagenet_unpack.__all__) <= set(dir(imagenet_unpack))

    def test_an_unknown_name_is_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match="no attribute 'unpak'"):
            imagenet_unpack.unpak  # noqa: B018
