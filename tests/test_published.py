"""What the same command does where a split is published already, or another run works on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from program import SLOW, Run, Tree, serial, tree

from imagenet_unpack.targets.paths import STATE_FOLDER

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


@pytest.fixture
def done(base: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Archives of its own, and the tree that was unpacked from them."""
    own, target = tmp_path / "own", tmp_path / "target"
    shutil.copytree(base, own)
    assert serial(own, target) == 0
    return own, target


class TestArchive:
    """A published split needs no archive; another archive than the first one is refused."""

    def test_touched(self, done: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
        os.utime(done[0] / TRAIN, (1, 1))
        assert serial(*done) == 0
        assert "modification time" in capsys.readouterr().err

    def test_elsewhere(self, done: tuple[Path, Path], tmp_path: Path) -> None:
        done[0].rename(tmp_path / "moved")
        assert serial(tmp_path / "moved", done[1]) == 0

    def test_one_is_gone(self, done: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
        (done[0] / TRAIN).unlink()
        assert serial(*done, "--json") == 0
        out, err = capsys.readouterr()
        assert f"{TRAIN}: no such file" in err
        assert {name: split["status"] for name, split in json.loads(out)["splits"].items()} == {
            "train": "published",
            "val": "published",
        }

    def test_both_are_gone(self, done: tuple[Path, Path]) -> None:
        shutil.rmtree(done[0])
        assert serial(*done) == 0
        next((done[1] / "train").glob("*/*")).unlink()
        assert serial(*done) == 4

    @pytest.mark.parametrize("options", [("--layout", "wnid"), ("--classes", "0-99"), ("--splits", "train,val")])
    def test_gone_and_needed(self, done: tuple[Path, Path], options: tuple[str, ...]) -> None:
        (done[0] / TRAIN).unlink()
        if options[0] == "--splits":
            shutil.rmtree(done[1] / "train")
        assert serial(*done, *options) == 5

    def test_another_one(self, done: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
        with open(done[0] / VAL, "ab") as file:
            file.write(bytes(10240))
        assert serial(*done) == 5
        assert "size" in capsys.readouterr().err
        assert serial(*done, "--splits", "train") == 0

    def test_more_classes_need_the_same_archive(self, base: Path, tmp_path: Path, expected: Tree) -> None:
        own, target = tmp_path / "own", tmp_path / "target"
        shutil.copytree(base, own)
        assert serial(own, target, "--classes", "0-3") == 0
        for name in (TRAIN, VAL):
            os.utime(own / name, (1, 1))
        assert serial(own, target, "--same-archive") == 0
        assert tree(target) == expected

    def test_the_same_archive_by_its_digest_or_by_word(self, base: Path, tmp_path: Path) -> None:
        own, target = tmp_path / "own", tmp_path / "target"
        shutil.copytree(base, own)
        assert serial(own, target, "--part", "0/2") == 0
        os.utime(own / TRAIN, (1, 1))
        assert serial(own, target) == 5
        assert serial(own, target, "--same-archive") == 0


class TestReadOnly:
    def test_a_tree_that_cannot_be_written(self, done: tuple[Path, Path]) -> None:
        own, target = done
        if os.geteuid() == 0:
            subprocess.run(["mount", "--bind", str(target), str(target)], check=False, capture_output=True)
            made = subprocess.run(["mount", "-o", "remount,bind,ro", str(target)], check=False, capture_output=True)
            if made.returncode:
                pytest.skip("cannot mount here")
        else:
            for folder in (target, target / STATE_FOLDER):
                folder.chmod(0o555)
        try:
            assert serial(own, target) == 0
        finally:
            if os.geteuid() == 0:
                subprocess.run(["umount", str(target)], check=True)
            else:
                for folder in (target, target / STATE_FOLDER):
                    folder.chmod(0o755)


def waiting(run: Run) -> Run:
    """Return when a run says that it waits."""
    assert run.process.stderr is not None
    while "waiting" not in (line := run.process.stderr.readline()):
        assert line, "it ended without a word of waiting"
    return run


class TestWait:
    def test_until_the_other_run_has_ended(self, base: Path, tmp_path: Path, expected: Tree) -> None:
        first = Run(base, tmp_path, *SLOW).at_work()
        others = [Run(base, tmp_path, "--wait") for _ in range(3)]
        code, _, err = first.end()
        ended_s = time.monotonic()
        assert code == 0, err
        for other in others:
            code, result, err = other.end()
            assert code == 0, err
            assert "waiting" in err
            assert str(first.process.pid) in err
            assert result["splits"]["train"]["status"] == "published"
        assert time.monotonic() - ended_s < 2  # two busy CPUs take 0.8 s for seven of them
        assert tree(tmp_path) == expected

    def test_takes_over_from_one_that_died(self, base: Path, tmp_path: Path, expected: Tree) -> None:
        first = Run(base, tmp_path, *SLOW).at_work()
        second = waiting(Run(base, tmp_path, "--wait"))
        first.process.kill()
        first.process.communicate()
        code, _, err = second.end()
        assert code == 0, err
        assert tree(tmp_path) == expected

    def test_ends_by_a_signal(self, base: Path, tmp_path: Path) -> None:
        first = Run(base, tmp_path, *SLOW).at_work()
        second = waiting(Run(base, tmp_path, "--wait"))
        second.process.terminate()
        assert second.end(timeout=10)[0] == 143
        first.process.terminate()
        assert first.end()[0] == 143


class TestDurability:
    """What was not synced is not believed after another boot."""

    def in_another_boot(self, path: Path) -> None:
        value = json.loads(path.read_text())
        assert value["durability"] == "none"
        path.write_text(json.dumps(value | {"boot_id": "another"}))

    def test_a_whole_tree_is_read_again_and_then_believed(
        self, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert serial(base, tmp_path, "--durability", "none") == 0
        record = tmp_path / STATE_FOLDER / "train.json"
        self.in_another_boot(record)
        assert serial(base, tmp_path, "--durability", "none") == 0
        assert "every byte" in capsys.readouterr().err
        assert "durability" not in json.loads(record.read_text())
        assert serial(base, tmp_path) == 0
        assert "every byte" not in capsys.readouterr().err

    @pytest.mark.parametrize("options", [(), ("--repair",), ("--wait",)])
    def test_a_durable_run_brings_a_whole_tree_to_the_disk(
        self, base: Path, tmp_path: Path, options: tuple[str, ...]
    ) -> None:
        """Whatever published it: exit code 0 of a durable run means that it is on the disk."""
        records = [tmp_path / STATE_FOLDER / f"{name}.json" for name in ("train", "val")]
        assert serial(base, tmp_path, "--durability", "none") == 0
        assert serial(base, tmp_path, "--durability", "none") == 0
        assert [json.loads(record.read_text())["durability"] for record in records] == ["none", "none"]
        assert serial(base, tmp_path, *options) == 0
        assert ["durability" in json.loads(record.read_text()) for record in records] == [False, False]

    def test_a_tree_that_was_lost_is_unpacked_again(self, base: Path, tmp_path: Path, expected: Tree) -> None:
        assert serial(base, tmp_path, "--durability", "none") == 0
        self.in_another_boot(tmp_path / STATE_FOLDER / "train.json")
        image = next((tmp_path / "train").glob("*/*"))
        image.write_bytes(bytes(image.stat().st_size))
        (tmp_path / "train.manifest.tsv").write_bytes(b"")
        assert serial(base, tmp_path, "--durability", "none") == 0
        assert tree(tmp_path) == expected

    def test_what_others_put_there_is_kept(self, base: Path, tmp_path: Path) -> None:
        assert serial(base, tmp_path, "--durability", "none") == 0
        self.in_another_boot(tmp_path / STATE_FOLDER / "train.json")
        (tmp_path / "train" / "mine").write_bytes(b"mine")
        assert serial(base, tmp_path, "--durability", "none") == 4
        assert (tmp_path / "train" / "mine").exists()

    def test_an_unfinished_run_begins_anew(self, base: Path, tmp_path: Path, expected: Tree) -> None:
        run = Run(base, tmp_path, *SLOW, "--durability", "none").at_work()
        time.sleep(1)
        run.process.terminate()
        assert run.end()[0] == 143
        self.in_another_boot(tmp_path / STATE_FOLDER / "train" / "plan.json")
        code, result, err = Run(base, tmp_path, "--durability", "none").end()
        assert code == 0, err
        assert result["splits"]["train"]["shards_skipped"] == 0
        assert tree(tmp_path) == expected

    def test_not_for_parts(self, base: Path, tmp_path: Path) -> None:
        assert serial(base, tmp_path, "--part", "0/2", "--durability", "none") == 2
