"""Compressed tars and standard input through the command line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factory
import pytest

from imagenet_unpack.cli import main as cli
from imagenet_unpack.dataset import ilsvrc2012, kinds, synth
from imagenet_unpack.dataset.synth import SynthSpec
from imagenet_unpack.targets.paths import STATE_FOLDER

SPEC = SynthSpec(classes=3, images_per_class=7, val_images=9, test_images=4, mean_bytes=3000)
LARGE = SynthSpec(classes=2, images_per_class=700, val_images=10, mean_bytes=100_000)
Files = dict[str, bytes]


def files_of(target: Path) -> Files:
    return {
        path.relative_to(target).as_posix(): path.read_bytes()
        for path in target.rglob("*")
        if path.is_file() and STATE_FOLDER not in path.parts
    }


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    synth.write_files(folder, kinds.files_of("official", SPEC))
    return folder


@pytest.fixture(scope="session")
def expected(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    target = tmp_path_factory.mktemp("expected")
    assert cli.main(["--base-dir", str(archives), "--target-dir", str(target), "--progress", "none"]) == 0
    return files_of(target)


def train_of(files: Files) -> Files:
    return {name: body for name, body in files.items() if name.startswith("train")}


def start(target: Path, *options: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "imagenet_unpack", "--target-dir", str(target), "--progress", "none", "--json"]
    environ = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    return subprocess.Popen(
        [*command, "--workers", "2", *options],
        stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err
    return process.returncode, json.loads(out) if out else {}, err


def run(target: Path, *options: str, stdin: bytes | None = None) -> tuple[int, dict[str, Any], str]:
    if stdin is None:
        return end(start(target, *options))
    read, write = os.pipe()
    process = start(target, *options, stdin=read)
    os.close(read)
    feed(write, stdin)
    return end(process)


def feed(fd: int, data: bytes) -> None:
    """Write until all is written or nobody reads any more, and close."""
    with os.fdopen(fd, "wb", buffering=0) as file:
        view = memoryview(data)
        try:
            while view:
                view = view[file.write(view) or 0 :]
        except BrokenPipeError:
            pass


@pytest.mark.parametrize(
    ("name", "compress"), [("tar.gz", gzip.compress), ("tar.xz", lzma.compress), ("tar.bz2", bz2.compress)]
)
def test_a_compressed_train_archive_is_found_in_the_base_folder(
    tmp_path: Path, archives: Path, expected: Files, name: str, compress: Callable[[bytes], bytes]
) -> None:
    data = (archives / ilsvrc2012.TRAIN_ARCHIVE_NAME).read_bytes()
    (tmp_path / f"ILSVRC2012_img_train.{name}").write_bytes(compress(data))
    code, found, _ = run(tmp_path / "out", "--base-dir", str(tmp_path))
    assert code == 0
    assert found["splits"]["train"]["images"] == 21
    assert files_of(tmp_path / "out") == train_of(expected)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_the_train_archive_comes_through_a_pipe(
    tmp_path: Path, archives: Path, expected: Files, pack: Callable[[bytes], bytes]
) -> None:
    data = pack((archives / ilsvrc2012.TRAIN_ARCHIVE_NAME).read_bytes())
    code, _, _ = run(tmp_path, "--source", "-", stdin=data)
    assert code == 0
    assert files_of(tmp_path) == train_of(expected)


def test_the_pipe_may_be_named_by_the_shell(tmp_path: Path, archives: Path, expected: Files) -> None:
    program = f"{sys.executable} -m imagenet_unpack --target-dir {tmp_path} --progress none"
    command = f"{program} --source <(cat {archives}/{ilsvrc2012.VAL_ARCHIVE_NAME})"
    environ = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    subprocess.run(["bash", "-c", command], check=True, timeout=60, env=environ, capture_output=True)
    assert files_of(tmp_path) == {name: body for name, body in expected.items() if name.startswith("val")}


def test_a_pipe_that_ends_early_keeps_what_is_whole_and_is_continued(
    tmp_path: Path, archives: Path, expected: Files
) -> None:
    data = (archives / ilsvrc2012.TRAIN_ARCHIVE_NAME).read_bytes()
    code, found, err = run(tmp_path, "--source", "-", stdin=data[: len(data) * 2 // 3])
    assert code == 3
    assert "ends too early" in err
    assert found["splits"]["train"]["status"] == "failed"
    assert not (tmp_path / "train").exists()
    code, found, _ = run(tmp_path, "--source", "-", stdin=gzip.compress(data))
    assert code == 0
    assert found["splits"]["train"]["shards_skipped"] > 0
    assert files_of(tmp_path) == train_of(expected)


def test_a_read_error_of_the_pipe_stops_the_run_and_it_is_continued(tmp_path: Path) -> None:
    inner = {wnid: factory.tar(factory.images(wnid, [os.urandom(300_000)] * 3)) for wnid in factory.WNIDS[:4]}
    data = factory.train_tar(inner)
    ours, theirs = socket.socketpair()
    theirs.send(b"x")  # never read: when our end is closed, theirs gives ECONNRESET after the data (unix(7))
    process = start(tmp_path, "--source", "-", stdin=theirs.fileno())
    theirs.close()
    ours.sendall(data[: len(data) * 2 // 3])
    ours.close()
    code, found, err = end(process)
    assert code == 6
    assert "reset" in err
    assert found["failures"][0]["kind"] == "source-io"
    assert not (tmp_path / "train").exists()
    done = found["splits"]["train"]["images"]
    assert done in (0, 3, 6)  # what was being written when the pipe failed may have been dropped
    code, found, _ = run(tmp_path, "--source", "-", stdin=data)
    assert code == 0
    assert found["splits"]["train"]["shards_skipped"] == done // 3


def test_another_archive_does_not_continue_a_run(tmp_path: Path, archives: Path) -> None:
    data = (archives / ilsvrc2012.TRAIN_ARCHIVE_NAME).read_bytes()
    assert run(tmp_path, "--source", "-", stdin=data[: len(data) * 2 // 3])[0] == 3
    changed = bytearray(data)
    changed[2048] ^= 1  # in the body of the first image
    code, _, err = run(tmp_path, "--source", "-", stdin=bytes(changed))
    assert code == 5
    assert "--restart" in err
    assert run(tmp_path, "--source", "-", "--restart", stdin=data)[0] == 0


def test_a_truncated_file_is_a_damaged_archive(tmp_path: Path, archives: Path) -> None:
    data = gzip.compress((archives / ilsvrc2012.TRAIN_ARCHIVE_NAME).read_bytes())
    path = factory.write(tmp_path / "train.tar.gz", data[: len(data) // 2])
    code, found, err = run(tmp_path / "out", "--source", str(path))
    assert code == 3
    assert "download is incomplete" in err
    assert found["failures"][0]["kind"] == "archive"
    assert not (tmp_path / "out/train").exists()


def test_a_damaged_inner_tar_is_one_class_lost(tmp_path: Path) -> None:
    first, second = factory.WNIDS[:2]
    good = factory.tar(factory.images(first, [b"abc"]))
    bad = factory.tar([(f"{second}_1.JPEG", b"abc"), (f"{second}_1.JPEG", b"abc")])
    data = factory.train_tar({first: good, second: bad, factory.WNIDS[2]: good})
    code, found, err = run(tmp_path, "--source", "-", stdin=data)
    assert code == 3
    assert "twice" in err
    assert found["splits"]["train"]["shards_failed"] == 1
    assert found["splits"]["train"]["images"] == 2


def test_a_validation_image_without_a_label_is_refused(tmp_path: Path) -> None:
    labels = factory.write(tmp_path / "labels.txt", f"{factory.val_name(1)} {factory.WNIDS[0]}\n".encode())
    data = factory.tar([(factory.val_name(1), b"abc"), (factory.val_name(2), b"abc")])
    code, _, err = run(tmp_path / "out", "--source", "-", "--val-labels", str(labels), stdin=gzip.compress(data))
    assert code == 5
    assert factory.val_name(2) in err
    assert not (tmp_path / "out/val").exists()


def test_classes_are_chosen_and_a_missing_one_is_named(tmp_path: Path, archives: Path, expected: Files) -> None:
    data = (archives / ilsvrc2012.TRAIN_ARCHIVE_NAME).read_bytes()
    assert run(tmp_path / "a", "--source", "-", "--classes", "1", stdin=data)[0] == 0
    found = [name for name in files_of(tmp_path / "a") if name.endswith(".JPEG")]
    assert found == [name for name in expected if name.startswith("train/1/")]
    code, _, err = run(tmp_path / "b", "--source", "-", "--classes", "1,7", stdin=data)
    assert code == 3
    assert factory.WNIDS[7] in err
    assert not (tmp_path / "b/train").exists()


def piped(target: Path, data: bytes, *options: str) -> int:
    """Run the command in this process on a pipe of its own and return its exit code."""
    read, write = os.pipe()
    feeder = threading.Thread(target=feed, args=(write, data))
    feeder.start()
    try:
        source = ("--source", f"/dev/fd/{read}", "--executor", "serial")
        return cli.main(["--target-dir", str(target), "--progress", "none", *source, *options])
    finally:
        os.close(read)
        feeder.join()


def state_of(target: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in (target, *target.rglob("*")))


def test_a_published_split_is_neither_read_again_nor_written_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the second pipe nothing but its beginning is whole; two of the three classes that it holds are asked for."""
    wnids = factory.WNIDS[:3]
    data = factory.train_tar({wnid: factory.tar(factory.images(wnid, [bytes(1 << 20)])) for wnid in wnids})
    cut = data[: len(data) // 2]
    assert piped(tmp_path, data, "--classes", "0,2") == 0
    before = state_of(tmp_path)
    assert piped(tmp_path, cut, "--classes", "0,2") == 0
    assert piped(tmp_path, cut, "--classes", "2") == 0
    assert piped(tmp_path, cut, "--classes", "0,7") == 5
    assert factory.WNIDS[7] in capsys.readouterr().err
    assert state_of(tmp_path) == before
    assert piped(tmp_path, cut) == 3  # class 1 is still to come
    assert piped(tmp_path, data) == 0
    before = state_of(tmp_path)
    assert piped(tmp_path, cut) == 0
    assert state_of(tmp_path) == before


def kaggle_tar(before: str, after: str) -> bytes:
    """An image of train and one of val, published as class 65, with a label file before and one after them."""
    root = "ILSVRC/Data/CLS-LOC"
    wnid = factory.WNIDS[0]
    members = [(f"{root}/train/{wnid}/{wnid}_1.JPEG", b"abc"), (f"{root}/val/{factory.val_name(1)}", b"abc")]
    for place, label in ((0, before), (3, after)):
        if label:
            rows = f"ImageId,PredictionString\n{factory.val_name(1).removesuffix('.JPEG')},{label} 1 2 3 4\n"
            members.insert(place, ("LOC_val_solution.csv", rows.encode()))
    return gzip.compress(factory.tar(members))


class TestLabelsInAStream:
    published = factory.WNIDS[factory.val_index(1)]

    def test_before_the_images(self, tmp_path: Path) -> None:
        assert piped(tmp_path, kaggle_tar(factory.WNIDS[7], "")) == 0
        assert (tmp_path / "val/7" / factory.val_name(1)).exists()

    def test_behind_the_images_they_may_confirm_what_was_known(self, tmp_path: Path) -> None:
        assert piped(tmp_path, kaggle_tar("", self.published)) == 0
        assert (tmp_path / f"val/{factory.val_index(1)}" / factory.val_name(1)).exists()

    @pytest.mark.parametrize("before", ["", factory.WNIDS[8]])
    def test_behind_the_images_they_must_not_contradict(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], before: str
    ) -> None:
        data = kaggle_tar(before, factory.WNIDS[7])
        assert piped(tmp_path, data) == 3
        assert "--val-labels" in capsys.readouterr().err
        assert not (tmp_path / "val").exists()
        assert (tmp_path / "train").exists()
        labels = factory.write(tmp_path / "labels.txt", f"{factory.val_name(1)} {factory.WNIDS[9]}\n".encode())
        assert piped(tmp_path, data, "--val-labels", str(labels), "--restart") == 0
        assert (tmp_path / "val/9" / factory.val_name(1)).exists()

    def test_that_lie_where_the_command_runs_are_not_those_of_a_pipe(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        labels = f"ImageId,PredictionString\n{factory.val_name(1)},{factory.WNIDS[7]} 1 2 3 4\n"
        factory.write(tmp_path / "LOC_val_solution.csv", labels.encode())
        assert run(tmp_path / "out", "--source", "-", stdin=kaggle_tar("", ""))[0] == 0
        assert (tmp_path / f"out/val/{factory.val_index(1)}" / factory.val_name(1)).exists()

    def test_damaged(self, tmp_path: Path) -> None:
        assert piped(tmp_path, kaggle_tar("nothing", "")) == 5
        assert not (tmp_path / "train").exists()


@pytest.mark.parametrize("options", [(), ("--any-wnids", "--layout", "wnid", "--splits", "train")], ids=["1k", "any"])
def test_a_tree_is_repaired_from_a_stream(tmp_path: Path, archives: Path, options: tuple[str, ...]) -> None:
    path = tmp_path / "train.tar.gz"
    path.write_bytes(gzip.compress((archives / ilsvrc2012.TRAIN_ARCHIVE_NAME).read_bytes()))
    target = tmp_path / "out"
    assert run(target, "--source", str(path), *options)[0] == 0
    whole = files_of(target)
    lost = [name for name in whole if name.endswith(".JPEG")][3::7]
    for name in lost:
        (target / name).unlink()
    code, _, err = run(target, "--source", str(path), "--repair", *options)
    assert code == 0, err
    assert files_of(target) == whole


def test_standard_input_is_named_once(tmp_path: Path, archives: Path) -> None:
    data = (archives / ilsvrc2012.TRAIN_ARCHIVE_NAME).read_bytes()
    assert run(tmp_path, "--source", "-", "--source", "-", stdin=data)[0] == 2


def test_a_terminal_is_not_waited_for(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    code, _, err = end(start(tmp_path, "--source", "-", stdin=theirs))
    os.close(ours)
    os.close(theirs)
    assert code == 5
    assert "terminal" in err


def test_a_stream_has_no_parts(tmp_path: Path, archives: Path) -> None:
    data = (archives / ilsvrc2012.TRAIN_ARCHIVE_NAME).read_bytes()
    code, _, err = run(tmp_path, "--source", "-", "--part", "0/2", stdin=data)
    assert code == 2
    assert "--part" in err


def test_a_signal_ends_the_wait_for_a_pipe_that_gives_nothing(tmp_path: Path) -> None:
    process = start(tmp_path, "--source", "-", stdin=subprocess.PIPE)
    time.sleep(2)  # it reads by then, or has not begun; either way it must end
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    process.communicate()
    assert not (tmp_path / STATE_FOLDER).exists()


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"<html><body>log in</body></html>", "web page"),
        (b"x" * 5000, "text"),
        (b"PK\3\4" + bytes(500), "--source"),
        (factory.tar([("ILSVRC2012_devkit_t12/readme.txt", b"x")]), "development kit"),
    ],
    ids=["nothing", "page", "text", "zip", "devkit"],
)
def test_a_pipe_of_something_else_is_called_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes, word: str
) -> None:
    assert piped(tmp_path, data) == 5
    assert word in capsys.readouterr().err


def test_the_plan_of_a_stream_says_that_it_does_not_know(tmp_path: Path, archives: Path) -> None:
    data = (archives / ilsvrc2012.TRAIN_ARCHIVE_NAME).read_bytes()
    (tmp_path / "ILSVRC2012_img_train.tar.gz").write_bytes(gzip.compress(data))
    command = [sys.executable, "-m", "imagenet_unpack", "plan", "--base-dir", str(tmp_path)]
    environ = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ, check=True)
    assert "gzip" in done.stdout
    assert "not known" in done.stdout + done.stderr


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An archive of two classes of 70 MB, so that each has two shards."""
    folder = tmp_path_factory.mktemp("large")
    synth.write_files(folder, kinds.files_of("official", LARGE))
    return (folder / ilsvrc2012.TRAIN_ARCHIVE_NAME).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)], ids=["kill", "term"])
def test_a_run_that_was_ended_is_continued(tmp_path: Path, large: bytes, number: int, code: int) -> None:
    read, write = os.pipe()
    process = start(tmp_path, "--source", "-", stdin=read)
    os.close(read)
    os.write(write, large[:1000])
    with os.fdopen(write, "wb", buffering=0) as file:
        file.write(large[1000 : len(large) // 2 + (8 << 20)])  # the first class and a little of the second
        journal = tmp_path / STATE_FOLDER / "train"
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size for path in journal.glob("*.journal")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        began = time.monotonic()
        assert process.wait(30) == code
        assert time.monotonic() - began < 10
    process.communicate()
    assert not (tmp_path / "train").exists()
    code, found, _ = run(tmp_path, "--source", "-", stdin=large)
    assert code == 0
    assert found["splits"]["train"]["shards_skipped"] >= 1
    assert found["splits"]["train"]["shards"] == 4
    assert cli.main(["check", str(tmp_path), "--deep", "--progress", "none"]) == 0
    assert len([name for name in files_of(tmp_path) if name.endswith(".JPEG")]) == 1400
