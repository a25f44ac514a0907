"""Draw the pictures of the help pages and of the guide in ComfyUI's real front end.

`python docs/comfyui/pictures.py [NODE_ID ...] [guide]` writes comfy_nodes/web/docs/assets/NODE_ID.png and, for the
guide, docs/comfyui/pictures/*.jpg; without arguments all of them. Needs what tests/ui needs: a ComfyUI and a Chromium.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from PIL import Image  # noqa: E402

from tests.comfyui.server import ComfyServer, Options, find_core  # noqa: E402
from tests.ui.browser import load_workflow, open_page, screenshot_of_graph  # noqa: E402

GUIDE = ROOT / "docs" / "comfyui" / "pictures"
WINDOW, LARGEST = {"width": 1500, "height": 900}, (1200, 720)
OUT = ROOT / "comfy_nodes" / "web" / "docs" / "assets"
WIDTH, MARGIN, PIXELS_PER_POINT, COLOURS = 360, 8, 1.5, 96
# What a user would have written.
TEXTS = {
    "LongCatVideoTextEncode": {"text": "A red vintage car drives along a coast road at sunset, seen from above."},
    "LongCatVideoLong": {"prompts": "A woman opens a door\nShe steps into the garden\nRain begins to fall"},
}
NODES = "() => Object.keys(LiteGraph.registered_node_types).filter((type) => type.startsWith('LongCatVideo'))"
DRAW = """([type, texts, width]) => {
  // Not cleared: a new graph counts nodes from 1 again, and the front end gives a known number its last values.
  for (const old of [...app.graph._nodes]) app.graph.remove(old);
  const node = LiteGraph.createNode(type);
  app.graph.add(node);
  for (const [name, text] of Object.entries(texts)) node.widgets.find((one) => one.name === name).value = text;
  const height = node.computeSize()[1];
  const written = (node.widgets ?? []).filter((one) => one.options?.multiline || one.type === "customtext").length;
  node.setSize([width, height + 30 * written]);
  app.canvas.deselectAll?.();
}"""
SHOW = """([margin, title]) => {
  const [node] = app.graph._nodes;
  const { ds, canvas } = app.canvas;
  ds.scale = 1;
  ds.offset[0] = 400 - node.pos[0];
  ds.offset[1] = 120 - node.pos[1];
  app.canvas.setDirty(true, true);
  const { x, y } = canvas.getBoundingClientRect();
  const at = { x: x + 400 - margin, y: y + 120 - title - margin };
  return { ...at, width: node.size[0] + 2 * margin, height: node.size[1] + title + 2 * margin };
}"""
TITLE = 30
ONLY_THE_GRAPH = """
* { visibility: hidden !important; transition: none !important; }
#graph-canvas, .dom-widget, .dom-widget * { visibility: visible !important; }
"""


def shrink(picture: bytes, path: Path) -> None:
    """Few colours, but those of the sockets too: a node is flat, and its picture travels with every installation."""
    image = (
        Image.open(io.BytesIO(picture))
        .convert("RGB")
        .quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    )
    image.save(path, optimize=True)


def save_jpeg(picture: bytes, name: str) -> None:
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.thumbnail(LARGEST)
    image.save(GUIDE / f"{name}.jpg", quality=85)


def draw_nodes(page: Any, names: list[str]) -> None:
    style = page.add_style_tag(content=ONLY_THE_GRAPH)
    for node_id in names:
        page.evaluate(DRAW, [node_id, TEXTS.get(node_id, {}), WIDTH])
        page.wait_for_timeout(600)
        box = page.evaluate(SHOW, [MARGIN, TITLE])
        page.wait_for_timeout(400)
        shrink(page.screenshot(clip=box), OUT / f"{node_id}.png")
    style.evaluate("(style) => style.remove()")


def draw_guide(page: Any) -> None:
    """The first workflow, a help page beside it, and the template browser."""
    load_workflow(page, json.loads((ROOT / "workflows" / "first_run.json").read_text(encoding="utf-8")))
    page.set_viewport_size(WINDOW)
    save_jpeg(screenshot_of_graph(page), "first_run")
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(1000)
    page.evaluate("() => app.canvas.selectNode(app.graph._nodes.find((one) => one.type === 'LongCatVideoSampler'))")
    page.get_by_test_id("info-button").click()
    page.get_by_role("heading", name="LongCat-Video Sampler").first.wait_for()
    page.wait_for_timeout(1000)
    save_jpeg(page.screenshot(), "help")
    page.route("**/templates/index*.json", lambda route: route.fulfill(json=[]))
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_role("dialog").get_by_text("LongCat-Video", exact=True).first.click()
    page.wait_for_timeout(2000)
    page.mouse.move(WINDOW["width"] - 5, WINDOW["height"] - 5)
    save_jpeg(page.screenshot(), "templates")


def main() -> None:
    core = find_core()
    if core is None:
        raise SystemExit("no ComfyUI: run `make .comfyui/installed`, or set COMFYUI_DIR")
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        lora = Path(folder, "models", "loras", "my_lora.safetensors")
        lora.parent.mkdir(parents=True)
        lora.touch()
        server = ComfyServer(core, Path(folder), Options())
        try:
            with open_page(server.url, scale=PIXELS_PER_POINT) as page:
                names = sys.argv[1:] or [*page.evaluate(NODES), "guide"]
                draw_nodes(page, [name for name in names if name != "guide"])
                if "guide" in names:
                    draw_guide(page)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
