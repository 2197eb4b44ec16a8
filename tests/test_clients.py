"""What real training libraries make of the trees; `docs/using.md` has the table that is computed here."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from factory import published_class
from PIL import Image

import imagenet_unpack
from imagenet_unpack.cli import main as cli
from imagenet_unpack.dataset import ilsvrc2012, jpeg
from imagenet_unpack.dataset.synth import SynthSpec, write_archives
from imagenet_unpack.model import LAYOUTS

pytestmark = [
    pytest.mark.clients,
    # What these libraries warn of is theirs.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(find_spec("torchvision") is None, reason="needs the extra [clients]"),
]
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "using.md"
SUBSET = "5,10-19,517"
SPLITS = ("train", "val")
Found = dict[str, tuple[int, Any]]
"""Class index and picture by the name of the image."""


@pytest.fixture(scope="session", autouse=True)
def _offline() -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every class, with one image or two."""
    folder = tmp_path_factory.mktemp("archives")
    write_archives(folder, SynthSpec(classes=1000, images_per_class=1, val_images=1000, mean_bytes=300))
    return folder


def unpacked(archives: Path, target: Path, *options: str) -> Path:
    command = ["--base-dir", str(archives), "--target-dir", str(target), "--workers", "2", "--progress", "none"]
    assert cli.main([*command, *options]) == 0
    return target


@pytest.fixture(scope="session")
def trees(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tree of every class in each layout, and one of a few classes."""
    made: dict[str, Path] = {
        layout: unpacked(archives, tmp_path_factory.mktemp(layout), "--layout", layout) for layout in LAYOUTS
    }
    made["subset"] = unpacked(archives, tmp_path_factory.mktemp("subset"), "--layout", "wnid", "--classes", SUBSET)
    return made


def pairs(paths: list[str], items: Iterator[tuple[Any, int]]) -> Found:
    return {Path(path).name: (index, picture) for path, (picture, index) in zip(paths, items, strict=True)}


def own(target: Path, split: str) -> Found:
    from torch.utils.data import DataLoader
    from torchvision.transforms.v2.functional import pil_to_tensor

    data = imagenet_unpack.ImageNet(target, split, transform=pil_to_tensor)  # type: ignore[arg-type]
    loader = DataLoader(data, batch_size=64, num_workers=2)
    items = ((image, int(index)) for images, indices in loader for image, index in zip(images, indices, strict=True))
    return pairs([path for path, _ in data.samples], items)


def image_folder(target: Path, split: str) -> Found:
    from torchvision.datasets import ImageFolder

    data = ImageFolder(target / split)
    return pairs([path for path, _ in data.samples], iter(data))


def torchvision_image_net(target: Path, split: str) -> Found:
    from torchvision.datasets import ImageNet

    assert cli.main(["lists", str(target), "--format", "torchvision"]) == 0
    data = ImageNet(target, split)
    assert all(names == tuple(ilsvrc2012.class_names()[k].split(", ")) for k, names in named(data))
    return pairs([path for path, _ in data.samples], iter(data))


def named(data: Any) -> Iterator[tuple[int, tuple[str, ...]]]:
    for wnid, names in zip(data.wnids, data.classes, strict=True):
        yield ilsvrc2012.WNIDS.index(wnid), names


def timm_folder(target: Path, split: str) -> Found:
    from timm.data import create_dataset

    data = create_dataset("", root=str(target / split))
    return pairs(data.filenames(absolute=True), iter(data))


def hugging_face(target: Path, split: str) -> Found:
    import datasets

    datasets.disable_progress_bars()
    cache = target.parent / f"{target.name}-cache-{split}"
    name = "validation" if split == "val" else split  # it takes the names of the folders for those of splits
    data = datasets.load_dataset("imagefolder", data_dir=str(target / split), split=name, cache_dir=str(cache))
    paths = [item["image"]["path"] for item in data.cast_column("image", datasets.Image(decode=False))]
    return pairs(paths, ((item["image"], item["label"]) for item in data))


def keras_folder(target: Path, split: str) -> Found:
    keras = pytest.importorskip("keras")
    data = keras.utils.image_dataset_from_directory(
        str(target / split), label_mode="int", image_size=(8, 8), batch_size=None, shuffle=False, verbose=False
    )
    return pairs(data.file_paths, ((image.numpy(), int(index)) for image, index in data))


CLIENTS: dict[str, Callable[[Path, str], Found]] = {
    "`imagenet_unpack.ImageNet`": own,
    "timm `create_dataset(root=...)`": timm_folder,
    "torchvision `ImageFolder`": image_folder,
    "torchvision `ImageNet`": torchvision_image_net,
    "Hugging Face `imagefolder`": hugging_face,
    "Keras `image_dataset_from_directory`": keras_folder,
}


def first_pixel(picture: Any) -> tuple[float, ...]:
    """The colour of an image: a tensor with its channels first, an array with them last, or a picture of Pillow."""
    if isinstance(picture, Image.Image):
        return tuple(picture.convert("RGB").resize((1, 1)).tobytes())
    values = picture if picture.shape[-1] == 3 else picture.permute(1, 2, 0)
    return tuple(float(value) for value in values[0, 0])


def cell(client: Callable[[Path, str], Found], tree: Path) -> str:
    """How many classes have their published index; every image is decoded and must show its class."""
    wrong: set[int] = set()
    classes: set[int] = set()
    for split in SPLITS:
        try:
            found = client(tree, split)
        except (AssertionError, RuntimeError, FileNotFoundError):
            return "not read"
        assert found.keys() == {path.name for path in (tree / split).rglob("*.JPEG")}
        for name, (index, picture) in found.items():
            published = published_class(name)
            assert math.dist(first_pixel(picture), jpeg.class_colour(published)) <= 3
            classes.add(published)
            if index != published:
                wrong.add(published)
    return f"{len(wrong)} of {len(classes)} wrong" if wrong else "right"


@pytest.mark.parametrize("client", CLIENTS)
def test_the_table_says_what_is_so(client: str, trees: dict[str, Path]) -> None:
    cells = [cell(CLIENTS[client], trees[tree]) for tree in (*LAYOUTS, "subset")]
    row = f"| {client} | {' | '.join(cells)} |"
    assert row in PAGE.read_text(encoding="utf-8").splitlines()


def test_what_sorts_folder_names_is_as_the_table_says(trees: dict[str, Path]) -> None:
    """DALI needs a GPU build to be tried: its documentation says that it sorts the names of the folders."""

    def sorted_names(tree: Path, split: str) -> Found:
        folders = sorted(path.name for path in (tree / split).iterdir())
        return {
            path.name: (index, Image.open(path))
            for index, folder in enumerate(folders)
            for path in (tree / split / folder).iterdir()
        }

    cells = [cell(sorted_names, trees[tree]) for tree in (*LAYOUTS, "subset")]
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| DALI")]
    assert [re.split(r" \| ", row.strip("| "))[1:] for row in rows] == [cells]


def snippets() -> list[str]:
    return re.findall(r"(?ms)^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"))


def test_the_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archives(tmp_path, SynthSpec(classes=12, images_per_class=4, val_images=12, mean_bytes=300))
    target = unpacked(tmp_path, tmp_path / "ImageNet", "--layout", "wnid")
    assert cli.main(["lists", str(target), "--format", "torchvision"]) == 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "snippet.py").write_text("\n".join(snippets()))
    assert len(snippets()) >= 4
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "snippet.py"], check=True, env=environ)


def readme_commands() -> list[str]:
    """The commands of the newcomer's way in README, from the archives to the epoch."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"(?ms)^## A first epoch.*?^```\n(.*?)^```$", text)
    assert block is not None
    return [line for line in block[1].splitlines() if not line.startswith("pip ")]


def test_the_newcomers_commands_train_an_epoch(tmp_path: Path) -> None:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = {"imagenet-unpack": [sys.executable, "-m", "imagenet_unpack"], "python": [sys.executable]}
    out = ""
    for line in readme_commands():
        name, *arguments = line.split()
        command = [*program[name], *arguments]
        out = subprocess.run(command, check=True, env=environ, cwd=tmp_path, stdout=subprocess.PIPE, text=True).stdout
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", out)]
    assert len(losses) > 2
    assert losses[-1] < losses[0] / 2
    right = re.search(r"validation: ([0-9]+)% right", out)
    assert right is not None
    assert int(right[1]) > 50
