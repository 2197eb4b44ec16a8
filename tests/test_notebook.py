"""The Python interface in a real Jupyter kernel: the bar is a widget, and an interrupted cell continues later."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from imagenet_unpack.dataset.synth import SynthSpec, write_archives

pytestmark = pytest.mark.clients

SPEC = SynthSpec(classes=6, images_per_class=20, val_images=12, mean_bytes=20_000)

# Drives the kernel from a process of its own: Jupyter's client leaves sockets and an event loop to its end.
DRIVER = """
import json, pathlib, threading, time
from jupyter_client.manager import start_new_kernel

manager, client = start_new_kernel()
call = "imagenet_unpack.unpack(base_dir='archives', target_dir='tree', workers=2, progress=bar"

def run(code):
    text, kinds = [], set()

    def output(message):
        content = message["content"]
        text.append(content.get("text", ""))
        kinds.update(content.get("data", ()))

    reply = client.execute_interactive(code, timeout=60, output_hook=output)["content"]
    return reply.get("ename") or reply["status"], "".join(map(str, text)), sorted(kinds)

def interrupt():
    while not any(pathlib.Path("tree").rglob("*.JPEG")):
        time.sleep(0.05)
    manager.interrupt_kernel()

cells = [run("import imagenet_unpack\\nbar = imagenet_unpack.ProgressBar()")]
threading.Thread(target=interrupt, daemon=True).start()
cells.append(run(call + ", max_write_rate=300_000)"))
cells.append(run(f"print(sum(split.images for split in {call}).splits.values()))"))
cells.append(run("print('alive')"))
client.stop_channels()
manager.shutdown_kernel(now=True)
print(json.dumps(cells))
"""


def test_a_widget_and_an_interrupted_cell(tmp_path: Path) -> None:
    pytest.importorskip("jupyter_client", reason="needs ipykernel (extra [clients])")
    pytest.importorskip("ipywidgets", reason="needs ipywidgets (extra [clients])")
    write_archives(tmp_path / "archives", SPEC)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    started, interrupted, continued, after = json.loads(done.stdout.splitlines()[-1])
    assert started[0] == "ok"
    assert interrupted[0] == "KeyboardInterrupt"
    assert "application/vnd.jupyter.widget-view+json" in interrupted[2]
    assert (continued[0], continued[1].split()[-1]) == ("ok", "132")
    assert (after[0], after[1].strip()) == ("ok", "alive")
