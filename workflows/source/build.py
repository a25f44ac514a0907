"""Draw the shipped workflows in ComfyUI's real front end: `make workflows`.

Writes NAME.json (what the front end saves), api/NAME.json (what it would queue) and a picture of each graph. Needs what
tests/ui needs: a ComfyUI and a Chromium.
"""

from __future__ import annotations

import dataclasses
import io
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

from tests.comfyui.server import ComfyServer, Options, find_core  # noqa: E402
from tests.ui.browser import open_page, screenshot_of_graph  # noqa: E402
from workflows.source.graphs import WORKFLOWS, Workflow  # noqa: E402

OUT = ROOT / "workflows"
DRAW = Path(__file__).with_name("draw.js").read_text(encoding="utf-8")
THUMBNAIL = (640, 360)


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


def thumbnail(picture: bytes, path: Path) -> None:
    """The graph's picture, fitted into the size of a template's card."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.thumbnail(THUMBNAIL)
    card = Image.new("RGB", THUMBNAIL, (24, 24, 27))
    card.paste(image, ((THUMBNAIL[0] - image.width) // 2, (THUMBNAIL[1] - image.height) // 2))
    card.save(path, quality=88)


def place_models(run: Path, workflow: Workflow) -> None:
    """Empty files for the models that a workflow names: the front end draws loaders red whose file is missing."""
    for model in (model for node in workflow.nodes for model in node.models):
        path = run / "models" / model["directory"] / model["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({}, path)


def main() -> None:
    core = find_core()
    if core is None:
        raise SystemExit("no ComfyUI: run `make .comfyui/installed`, or set COMFYUI_DIR")
    chosen = [make() for make in WORKFLOWS if not sys.argv[1:] or make.__name__ in sys.argv[1:]]
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
                    thumbnail(screenshot_of_graph(page), OUT / f"{workflow.name}.jpg")
        finally:
            server.stop()


if __name__ == "__main__":
    main()
