from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from factory import WNIDS, train_plan

from imagenet_unpack.cli import main as cli
from imagenet_unpack.dataset import kinds
from imagenet_unpack.dataset.synth import SynthSpec, write_archives, write_files
from imagenet_unpack.errors import ArchiveError
from imagenet_unpack.model import class_refs
from imagenet_unpack.planning.kagglezip import KaggleZip
from imagenet_unpack.run.tune import Trial, _Pieces, _Runs, _UsedUpError, ladder, recommend, run_trials
from imagenet_unpack.sources.tarindex import Entry, read_entry


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    write_archives(folder, SynthSpec(classes=6, images_per_class=60, val_images=0, mean_bytes=5000))
    return folder


def trial(workers: int, rate: float) -> Trial:
    return Trial(workers=workers, window_bytes=1, size_bytes=int(rate * 10), images=1, elapsed_s=10, cpu_s=1)


def test_the_fewest_workers_near_the_best_are_recommended() -> None:
    advice, best = recommend([trial(1, 100), trial(2, 195), trial(4, 200), trial(8, 190)])
    assert (advice.workers, best.workers) == (2, 4)
    advice, best = recommend([trial(1, 100), trial(2, 150), trial(4, 200)])
    assert advice is best


def test_the_ladder_goes_beyond_the_cpus() -> None:
    assert ladder(1)[-1] == 16
    assert ladder(8)[-1] == 32
    assert ladder(1000)[-1] == 64


def test_pieces_are_whole_members_and_never_the_same(base: Path) -> None:
    plan = train_plan(base / "ILSVRC2012_img_train.tar")
    data = Path(plan.archive.path).read_bytes()
    source = _Pieces(plan)
    seen: set[int] = set()
    while len(seen) < 6 * 60:
        (piece,) = source.take(20_000)
        at = piece.offset
        while at < piece.end:
            entry = read_entry(lambda start, n: data[start : start + n], at, len(data), "")
            assert isinstance(entry, Entry)
            assert entry.header_offset not in seen
            seen.add(entry.header_offset)
            at = entry.end
        assert at == piece.end
    with pytest.raises(_UsedUpError):
        source.take(20_000)
    assert len(seen) == 6 * 60


def test_trials_count_what_they_extract_and_leave_nothing(base: Path, tmp_path: Path) -> None:
    plan = train_plan(base / "ILSVRC2012_img_train.tar")
    trials = list(run_trials(plan, tmp_path, (1, 2), sample_bytes=400_000, budget_s=60))
    assert [each.workers for each in trials] == [1, 2]
    for each in trials:
        assert 100_000 < each.size_bytes < 400_000
        assert each.images > 10
        assert each.elapsed_s > 0
    assert list(tmp_path.iterdir()) == []


def test_an_archive_that_is_used_up_ends_the_trials(base: Path, tmp_path: Path) -> None:
    """A few members feed the first number of workers, not the next one: what was measured is worth a recommendation."""
    plan = train_plan(base / "ILSVRC2012_img_train.tar")
    trials = list(run_trials(plan, tmp_path, (1, 200), sample_bytes=1 << 30, budget_s=60))
    assert [each.workers for each in trials] == [1]
    with pytest.raises(ArchiveError, match="too small"):
        list(run_trials(plan, tmp_path, (200,), sample_bytes=1 << 30, budget_s=60))
    assert list(tmp_path.iterdir()) == []


def test_the_budget_ends_the_trials(base: Path, tmp_path: Path) -> None:
    plan = train_plan(base / "ILSVRC2012_img_train.tar")
    times = iter([0.0, 0.0, 5.0, 5.0, 5.0, 5.0])
    trials = list(run_trials(plan, tmp_path, (1, 2), sample_bytes=100_000, budget_s=6, clock=lambda: next(times)))
    assert len(trials) == 1


def test_the_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tune", "--base-dir", str(base), "--target-dir", str(tmp_path), "--workers", "1,2", "--sample", "300k"]
    assert cli.main(command) == 0
    assert "use --workers" in capsys.readouterr().out
    assert cli.main([*command, "--json", "--budget", "1m"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [each["workers"] for each in result["trials"]] == [1, 2]
    assert result["workers"] in (1, 2)
    assert list(tmp_path.iterdir()) == []
    assert cli.main([*command[:3], "--target-dir", str(tmp_path / "none")]) == 2
    assert cli.main(["tune", "--base-dir", str(tmp_path)]) == 5


@pytest.mark.parametrize("kind", ["kaggle-zip", "hf-parquet", "image"])
def test_a_zip_parquet_files_and_an_image(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "hf-parquet":
        pytest.importorskip("pyarrow")
    base = tmp_path / "base"
    spec = SynthSpec(classes=10, images_per_class=100, val_images=0, mean_bytes=3000)
    write_files(base, kinds.files_of("official" if kind == "image" else kind, spec))
    command = ["tune", "--base-dir", str(base), "--target-dir", str(tmp_path), "--workers", "1,2", "--sample", "1M"]
    if kind == "image":
        image = base / "images.sqfs"
        assert cli.main(["image", "--base-dir", str(base), "--output", str(image), "--progress", "none"]) == 0
        command += ["--train-archive", str(image)]
        capsys.readouterr()
    assert cli.main([*command, "--json"]) == 0
    trials = json.loads(capsys.readouterr().out)["trials"]
    assert [each["workers"] for each in trials] == [1, 2]
    assert all(each["size_bytes"] > 200_000 for each in trials)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_runs_of_a_zip_are_never_the_same(tmp_path: Path) -> None:
    spec = SynthSpec(classes=3, images_per_class=20, val_images=0, mean_bytes=3000)
    write_files(tmp_path, kinds.files_of("kaggle-zip", spec))
    zipped = KaggleZip(next(tmp_path.glob("*.zip")), WNIDS, run_bytes=10_000)
    plan = zipped.plan("train", class_refs(WNIDS, "wnid"), None, "wnid")
    source = _Runs(plan)
    taken = [shard for _ in range(3) for shard in source.take(15_000)]
    assert len({shard.id for shard in taken}) == len(taken) > 5
    with pytest.raises(_UsedUpError):
        source.take(1 << 20)


@pytest.mark.parametrize("kind", ["official-targz", "kaggle-targz", "kaggle-zip-targz", "hf-targz"])
def test_a_stream_is_refused(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_files(tmp_path, kinds.files_of(kind, SynthSpec(classes=1, images_per_class=5, val_images=1)))
    assert cli.main(["tune", "--base-dir", str(tmp_path)]) == 2
    assert "one process reads" in capsys.readouterr().err


def test_a_folder_of_inner_tars(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ILSVRC2012_img_train"
    with tarfile.open(base / "ILSVRC2012_img_train.tar") as archive:
        folder.mkdir()
        for each in archive:
            content = archive.extractfile(each)
            assert content is not None
            (folder / each.name).write_bytes(content.read())
    command = ["tune", "--target-dir", str(tmp_path), "--workers", "1", "--sample", "300k"]
    assert cli.main([*command, "--base-dir", str(tmp_path)]) == 0
    assert cli.main([*command, "--train-archive", str(folder)]) == 0
