"""Draw the shipped workflows in ComfyUI's real front end: `make workflows`.

`python workflows/source/build.py [--frames] [NAME ...]` writes NAME.json (what the front end saves), api/NAME.json
(what it would queue) and NAME.jpg, a picture of the graph. With `--frames` each workflow is also run, and frames of its
video lie over the graph; one that names models to download keeps the graph alone. Needs what tests/ui needs: a ComfyUI
and a Chromium.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from lcv_core.video_io import read_video  # noqa: E402
from tests.comfyui.api import Client  # noqa: E402
from tests.comfyui.server import ComfyServer, Options, find_core  # noqa: E402
from tests.ui.browser import open_page, screenshot_of_graph  # noqa: E402
from workflows.source.graphs import WORKFLOWS, Workflow  # noqa: E402
from workflows.source.thumbnails import frames_card, graph_card  # noqa: E402

OUT = ROOT / "workflows"
DRAW = Path(__file__).with_name("draw.js").read_text(encoding="utf-8")
FRAMES = 3
RUN_SECONDS = 3600


def draw(page: Any, workflow: Workflow) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is saved, what is queued)."""
    made = json.loads(page.evaluate(f"({DRAW})", dataclasses.asdict(workflow)))
    saved, prompt = made["workflow"], made["prompt"]
    saved["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"longcat-video-nodes/{workflow.name}"))  # not a new one each time
    saved["revision"] = 0
    saved.get("extra", {}).pop("ds", None)  # where the view stood
    return saved, prompt


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def frames_of(client: Client, prompt: dict[str, Any]) -> list[Image.Image]:
    """Run the workflow: frames of the video that it saves, from the first to the last at equal distances."""
    (saved,) = (key for key, node in prompt.items() if node["class_type"] == "SaveVideo")
    result = client.run(prompt, timeout=RUN_SECONDS)
    (file,) = result.outputs[saved]["images"]
    video = read_video(client.server.run / file["type"] / file["subfolder"] / file["filename"])
    chosen = (round(index * (len(video) - 1) / (FRAMES - 1)) for index in range(FRAMES))
    return [Image.fromarray(video[index].numpy()) for index in chosen]


def place_models(run: Path, workflow: Workflow) -> None:
    """Empty files for the models that a workflow names: the front end draws loaders red whose file is missing."""
    for model in (model for node in workflow.nodes for model in node.models):
        path = run / "models" / model["directory"] / model["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({}, path)


def main() -> None:
    options = {argument for argument in sys.argv[1:] if argument.startswith("-")}
    names = set(sys.argv[1:]) - options or {make.__name__ for make in WORKFLOWS}
    if options - {"--frames"} or names - {make.__name__ for make in WORKFLOWS}:
        raise SystemExit(__doc__)
    core = find_core()
    if core is None:
        raise SystemExit("no ComfyUI: run `make .comfyui/installed`, or set COMFYUI_DIR")
    chosen = [make() for make in WORKFLOWS if make.__name__ in names]
    with tempfile.TemporaryDirectory() as folder:
        for workflow in chosen:
            place_models(Path(folder), workflow)
        server = ComfyServer(core, Path(folder), Options())
        try:
            with open_page(server.url) as page:
                for workflow in chosen:
                    saved, prompt = draw(page, workflow)
                    write(OUT / f"{workflow.name}.json", saved)
                    write(OUT / "api" / f"{workflow.name}.json", prompt)
                    graph = screenshot_of_graph(page)
                    runs = bool(options) and not any(node.models for node in workflow.nodes)
                    card = frames_card(graph, frames_of(Client(server), prompt)) if runs else graph_card(graph)
                    card.save(OUT / f"{workflow.name}.jpg", quality=88)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
