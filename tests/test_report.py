from __future__ import annotations

import base64
import functools
import http.server
import io
import itertools
import json
import math
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from imagenet_unpack.cli import main as cli
from imagenet_unpack.cli.report import contents
from imagenet_unpack.cli.report.charts import run_charts
from imagenet_unpack.dataset import ilsvrc2012, jpeg
from imagenet_unpack.dataset.synth import SynthSpec, write_archives
from imagenet_unpack.targets.paths import timeline_file

SPEC = SynthSpec(classes=5, images_per_class=6, val_images=10, mean_bytes=500)
NAMES = ilsvrc2012.class_names()


class Page(HTMLParser):
    """What a reader of the page finds in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.words = ""
        self.pictures: dict[int, dict[str, bytes]] = {}
        self._class = -1
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.urls += [str(value) for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        if (values.get("id") or "").startswith("class-"):
            self._class = int(str(values["id"])[6:])
        if tag == "img":
            data = base64.b64decode(str(values["src"]).partition(",")[2])
            self.pictures.setdefault(self._class, {})[str(values["alt"])] = data

    def handle_data(self, data: str) -> None:
        self.words += data

    def shows(self, class_index: int, name: str) -> int:
        """The class whose colour the thumbnail of an image has."""
        with Image.open(io.BytesIO(self.pictures[class_index][name])) as image:
            red, green, blue = image.convert("RGB").getpixel((20, 20))
        distances = [math.dist((red, green, blue), jpeg.class_colour(index)) for index in range(SPEC.classes)]
        return distances.index(min(distances))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    write_archives(tmp_path / "in", SPEC)
    command = ["--base-dir", str(tmp_path / "in"), "--target-dir", str(tmp_path / "t"), "--executor", "serial"]
    assert cli.main([*command, "--progress", "none"]) == 0
    return tmp_path / "t"


def report(target: Path, *options: str) -> str:
    output = target.parent / "report.html"
    assert (
        cli.main(["report", str(target), "--output", str(output), "--workers", "1", "--progress", "none", *options])
        == 0
    )
    return output.read_text(encoding="utf-8")


def test_every_class_is_there_with_its_images(target: Path) -> None:
    text = report(target)
    page = Page(text)
    assert sorted(page.pictures) == list(range(5))
    for index, pictures in page.pictures.items():
        assert len(pictures) == 8
        assert all(page.shows(index, name) == index for name in pictures)
        assert NAMES[index] in page.words
        assert ilsvrc2012.WNIDS[index] in page.words
    assert page.words.count("✓ whole") == 2
    assert all(url.startswith(("data:", "#")) for url in page.urls)
    assert "http" not in text.replace("http-equiv", "")


def test_a_moved_image_is_seen_in_the_class_it_was_moved_to(target: Path) -> None:
    moved = next((target / "train" / "3").iterdir())
    moved.rename(target / "train" / "1" / moved.name)
    page = Page(report(target, "--images", "2"))
    assert page.shows(1, moved.name) == 3
    assert "not in the manifest" in page.words
    assert f"train/3/{moved.name}" in page.words
    assert "2 differences" in page.words


def test_wrong_labels_are_seen(target: Path) -> None:
    labels = [line.split() for line in (target.parent / "in" / "ImageNet_val_label.txt").read_text().splitlines()]
    first, second = (next(pair for pair in labels if pair[1] == ilsvrc2012.WNIDS[index]) for index in (0, 2))
    first[1], second[1] = second[1], first[1]
    (target.parent / "labels").write_text("".join(f"{name} {wnid}\n" for name, wnid in labels))
    shutil.rmtree(target)
    command = ["--base-dir", str(target.parent / "in"), "--target-dir", str(target), "--executor", "serial"]
    assert cli.main([*command, "--progress", "none", "--val-labels", str(target.parent / "labels")]) == 0
    page = Page(report(target))
    assert page.shows(2, first[0]) == 0
    assert page.shows(0, second[0]) == 2


def test_a_tree_without_manifests_and_broken_images(target: Path) -> None:
    for path in [*target.glob("*.tsv"), *target.glob(".imagenet_unpack/*.*")]:
        path.unlink()
    broken = next((target / "val" / "4").iterdir())
    broken.write_bytes(b"")
    page = Page(report(target))
    assert len(page.pictures[3]) == 8
    assert broken.name not in page.pictures[4]
    assert "cannot be decoded" in page.words
    assert "No log of a run" in page.words


def test_hostile_names_are_text(target: Path) -> None:
    name = "<script>alert(1)</script>.JPEG"
    (target / "train" / "0" / name.replace("/", "")).write_bytes(b"")
    text = report(target)
    assert "<script>alert" not in text


def test_only_a_report_is_replaced(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = target.parent / "report.html"
    first = report(target)
    assert report(target)[:500] == first[:500]
    output.write_text("mine")
    assert cli.main(["report", str(target), "--output", str(output), "--progress", "none"]) == 5
    assert output.read_text() == "mine"
    assert cli.main(["report", str(target / "train.manifest.tsv"), "--output", "x.html", "--progress", "none"]) == 5
    assert "Traceback" not in capsys.readouterr().err


def test_the_json_object_names_the_page(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(target, "--json")
    value = json.loads(capsys.readouterr().out)
    assert value["command"] == "report"
    assert Path(value["output"]).name == "report.html"
    assert value["splits"]["train"]["images"] == 30


def test_the_last_run_over_time(target: Path) -> None:
    points = [[0, 0, 0, ""], [1, 100, 10_000_000, ""], [2, 100, 10_000_000, "free space"], [5, 200, 20_000_000, ""]]
    points += [[6, 200, 20_000_000, ""], [7, 200, 20_000_000, ""]]  # the check
    value = {"schema": 1, "began": 1_700_000_000, "elapsed_s": 6, "workers": 3, "points": points}
    timeline_file(target).write_text(json.dumps(value))
    run = contents.last_run(target)
    assert run is not None
    charts = run_charts(run)
    assert charts is not None
    assert charts.images.mean == 40
    assert charts.megabytes.mean == 4
    assert charts.images.top == 100
    assert charts.waited_s == (("free space", 3.0),)
    page = Page(report(target))
    assert "Waited 3.0 s for free space" in page.words
    for damaged in ("", "{}", '{"points": [[1]]}', "[" * 100_000):
        timeline_file(target).write_text(damaged)
        assert contents.last_run(target) is None


class Chromium:
    """A headless Chromium, and a server on this host that counts what it is asked for."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if program is None:
            pytest.skip("needs a Chromium on this machine")
        self.program = program
        self.folder = folder
        self.asked: list[str] = []

    def run(self, page: str, *options: str) -> str:
        """Open a page of the folder and return what the browser prints."""
        asked = self.asked

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
                pass

            def do_GET(self) -> None:
                asked.append(self.path)
                super().do_GET()

        handler = functools.partial(Handler, directory=str(self.folder))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            command = [
                self.program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                "--disable-features=NetworkTimeServiceQuerying",
                # What the browser itself would ask for stays on this host.
                "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
                f"--user-data-dir={self.folder / 'profile'}", *options, f"http://127.0.0.1:{server.server_port}/{page}",
            ]  # fmt: skip
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
            finally:
                server.shutdown()
                thread.join()
        return done.stdout


@pytest.fixture
def chromium(tmp_path: Path) -> Chromium:
    return Chromium(tmp_path)


@pytest.mark.browser
def test_a_browser_shows_it_and_asks_for_nothing_else(target: Path, chromium: Chromium) -> None:
    moved = next((target / "train" / "3").iterdir())
    moved.rename(target / "train" / "1" / moved.name)
    report(target)
    shown = Page(chromium.run("report.html", "--dump-dom"))
    assert chromium.asked == ["/report.html"]
    assert "5 of 5 classes" in shown.words  # by the page's script
    assert shown.shows(1, moved.name) == 3
    assert all(name in shown.words for name in NAMES[:5])


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_thumbnails_are_painted(target: Path, chromium: Chromium, scheme: str) -> None:
    report(target)
    picture = target.parent / "shot.png"
    options = ["--force-dark-mode"] if scheme == "dark" else []
    chromium.run("report.html", *options, "--window-size=1100,3000", f"--screenshot={picture}")
    with Image.open(picture) as image:
        colours = {colour: count for count, colour in image.convert("RGB").getcolors(1 << 24) or ()}
    background = max(colours, key=lambda colour: colours[colour])
    assert (sum(background) > 600) is (scheme == "light")
    for index in range(1, SPEC.classes):  # class 0 is black
        near = [count for colour, count in colours.items() if math.dist(colour, jpeg.class_colour(index)) < 8]
        assert sum(near) > 8 * 40 * 40


@pytest.mark.browser
def test_the_page_works_without_a_script(target: Path, chromium: Chromium) -> None:
    text = report(target)
    (target.parent / "plain.html").write_text(text.replace("script-src 'unsafe-inline'", "script-src 'none'"))
    shown = Page(chromium.run("plain.html", "--dump-dom"))
    assert "5 of 5 classes" not in shown.words
    assert len(list(itertools.chain.from_iterable(shown.pictures.values()))) == 40
