"""ComfyUI's front end in a real Chromium: open it, load graphs into it, ask what it shows.

Which Chromium: $CHROMIUM, else one on PATH, else the one that get_chromium.py puts into `.comfyui/chromium`. The page
reaches the ComfyUI server and nothing else. What is asked inside the page is in graph_tools.js.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from playwright.sync_api import Browser, ConsoleMessage, Page, Route, sync_playwright

Json = Any
REPOSITORY = Path(__file__).resolve().parents[2]
UNPACKED = REPOSITORY / ".comfyui" / "chromium"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
NO_CHROMIUM = (
    "no Chromium: install one (Debian: apt-get install chromium), name one in CHROMIUM, or install npm and run"
)
NO_CHROMIUM += " `make .comfyui/installed`"
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
TOOLS = Path(__file__).with_name("graph_tools.js")
START_MS = 90_000
CALL_MS = 30_000
# Sent to the server before the page opens. Nothing in front of the graph, nothing left out when it is small.
SETTINGS = {
    "Comfy.ColorPalette": "dark",
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "99.0.0",
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Workflow.Persist": True,  # else older front ends open no workflow at the start, and nothing says it is over
    "Comfy.Validation.Workflows": True,
    "Comfy.UseNewMenu": "Top",
    # 1.27 stumbles at its start when it has to derive the second and third from the first.
    "Comfy.Canvas.NavigationMode": "legacy",
    "Comfy.Canvas.LeftMouseClickBehavior": "panning",
    "Comfy.Canvas.MouseWheelScroll": "zoom",
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
    "Comfy.VueNodes.Enabled": False,
    "Comfy.Locale": "en",
}
# Errors that ComfyUI's own front end reports on an empty, healthy server without any pack.
CORES_OWN = tuple(
    map(
        re.compile,
        (
            r"404.*/user\.css$",  # the user's own style sheet, asked for at two addresses
            r"404.*/api/userdata/comfy\.templates\.json$",  # saved node templates
            r"404.*/api/userdata\?dir=(workflows|subgraphs)\b",  # folders that the first save makes
            r"404.*/api/jobs\?",  # newer than the oldest cores that this front end is used with
            r"(^\[Jobs API\]|^Failed to fetch queue:).*Failed to fetch jobs: 404",
            r"^ComfyApp graph accessed before initialization",
            # 1.32, which sets one of its settings before it knows it.
            r"^TypeError: Cannot read properties of undefined \(reading 'id'\)\s+at onChange \S+\s+at Proxy\.set",
            r"^Attempted to cleanup event listeners for graph that was never set up",  # 1.27, when a subgraph is made
            # A stock loader of an empty input folder asks for the preview of nothing.
            r"404.*/api/view\?type=input&filename=(null|undefined)&",
        ),
    )
)
# A front end that is not the one its core was released with says so, once.
CORES_OWN_ALERT = re.compile("Version Compatibility Warning")
# Only the graph: its canvas, and the elements that lie over it as parts of nodes.
ONLY_THE_GRAPH = """
* { visibility: hidden !important; transition: none !important; }
#graph-canvas, .dom-widget, .dom-widget *, .lg-node, .lg-node * { visibility: visible !important; }
"""
MARGIN = 16

_errors: WeakKeyDictionary[Page, list[str]] = WeakKeyDictionary()


def find_chromium() -> Path | None:
    """The browser to test with; None where there is none.

    Raises:
        FileNotFoundError: CHROMIUM names no program.
    """
    named = os.environ.get("CHROMIUM")
    if named:
        found = shutil.which(named)
        if not found:
            raise FileNotFoundError(f"CHROMIUM={named} is no program")
        return Path(found)
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found:
        return Path(found)
    return UNPACKED / "chromium" if (UNPACKED / "chromium").is_file() else None


def environment(chromium: Path) -> dict[str, str | float | bool]:
    """Variables for the browser. The unpacked one brings libraries and fonts that a bare machine lacks."""
    if chromium.parent != UNPACKED:
        return dict(os.environ)
    libraries = [str(UNPACKED / "al2023" / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
    fonts = {"FONTCONFIG_PATH": str(UNPACKED / "fonts")}
    return os.environ | fonts | {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries))}


@contextlib.contextmanager
def open_page(url: str, *, settings: dict[str, Json] | None = None, scale: float = 1) -> Iterator[Page]:
    """The front end of the server at `url`, with an empty graph.

    Args:
        settings: of the front end, on top of SETTINGS. The server keeps them.
        scale: pixels of a picture for one of the page.

    Raises:
        FileNotFoundError: there is no Chromium.
    """
    chromium = find_chromium()
    if chromium is None:
        raise FileNotFoundError(NO_CHROMIUM)
    put_settings(url, SETTINGS | (settings or {}))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS, env=environment(chromium))
        try:
            with _new_page(browser, url, {}, scale) as page:
                yield page
        finally:
            browser.close()


@contextlib.contextmanager
def another_page(
    page: Page, *, settings: dict[str, Json] | None = None, instead: dict[str, str] | None = None
) -> Iterator[Page]:
    """A second page of the same browser and server, as another user's.

    Args:
        settings: of SETTINGS, while it is open.
        instead: pattern of an address -> JavaScript that is served there.
    """
    url = page.url.split("#")[0].rstrip("/")
    settings = settings or {}
    browser = page.context.browser
    assert browser
    put_settings(url, settings)
    try:
        with _new_page(browser, url, instead or {}) as other:
            yield other
    finally:
        put_settings(url, {name: SETTINGS[name] for name in settings})


@contextlib.contextmanager
def _new_page(browser: Browser, url: str, instead: dict[str, str], scale: float = 1) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1920, "height": 1080}, device_scale_factor=scale)
    page.set_default_timeout(CALL_MS)
    page.add_init_script(path=TOOLS)
    page.route("**/*", lambda route: _only_to(url, route))
    for pattern, script in instead.items():
        page.route(pattern, lambda route, _, body=script: route.fulfill(content_type="text/javascript", body=body))
    errors = _errors[page] = []
    page.on("console", lambda message: _note(url, message, errors))
    page.on("pageerror", lambda error: _add(error.stack or str(error), errors))
    try:
        page.goto(url)
        page.wait_for_function("() => graphTools.ready()", timeout=START_MS)
        page.wait_for_load_state("networkidle")
        page.evaluate("() => graphTools.clear()")
        yield page
    finally:
        page.close()


def put_settings(url: str, settings: dict[str, Json]) -> None:
    """Change settings of the server's only user; the front end reads them when it starts."""
    content = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/settings", json.dumps(settings).encode(), content)
    with urllib.request.urlopen(request, timeout=30):
        pass


def _only_to(url: str, route: Route) -> None:
    if route.request.url.startswith((url, "data:", "blob:")):
        route.continue_()
    else:
        route.abort()


def _note(url: str, message: ConsoleMessage, errors: list[str]) -> None:
    place = message.location.get("url", "")
    # What was blocked by _only_to is reported with the address that was asked for.
    outside = message.text.startswith("Failed to load resource: net::") and not place.startswith(url)
    text = f"{message.text} {place}".strip()
    if message.type == "error" and not outside:
        _add(text, errors)


def _add(error: str, errors: list[str]) -> None:
    if not any(pattern.search(error) for pattern in CORES_OWN):
        errors.append(error)


def console_errors(page: Page) -> list[str]:
    """Errors in the console and exceptions nobody caught, since the page opened or `forget` was called."""
    return list(_errors[page])


def forget(page: Page) -> None:
    """An empty graph, no errors and no messages."""
    page.evaluate("() => graphTools.clear()")
    _errors[page].clear()


def load_workflow(page: Page, workflow: Json) -> None:
    """Open a workflow as a user does (`workflow`: the UI form), and wait until it is drawn."""
    page.evaluate("(workflow) => graphTools.load(workflow)", workflow)


def load_file(page: Page, name: str, content: bytes) -> None:
    """Drop a file onto the graph: a workflow, or a picture or video that has one in it."""
    with page.expect_event("console", lambda message: message.text == f"dropped {name}"):
        page.evaluate("([name, bytes]) => graphTools.drop(name, bytes)", [name, list(content)])


def graph_to_prompt(page: Page) -> Json:
    """The API form of the graph, as it would be queued."""
    return page.evaluate("() => graphTools.prompt()")


def without_titles(prompt: Json) -> Json:
    """A prompt without `_meta`: it has the nodes' titles, which other cores word otherwise and no server reads."""
    return {key: {name: node[name] for name in node if name != "_meta"} for key, node in prompt.items()}


def saved_workflow(page: Page) -> Json:
    """The UI form of the graph, as it would be saved and as it is written into results."""
    return json.loads(page.evaluate("() => graphTools.saved()"))


def missing_nodes(page: Page) -> list[str]:
    """Types of nodes in the graph that this ComfyUI does not have."""
    return page.evaluate("() => graphTools.missing()")


def red_nodes(page: Page) -> list[str]:
    """Titles of the nodes that are marked as wrong."""
    return page.evaluate("() => graphTools.red()")


def describe(page: Page) -> Json:
    """What is drawn: nodes, groups and links with their places and sizes. Shows the whole graph."""
    return page.evaluate("() => graphTools.describe()")


def alerts(page: Page) -> list[str]:
    """Texts of the messages and dialogs in front of the graph."""
    return [text for text in page.evaluate("() => graphTools.alerts()") if not CORES_OWN_ALERT.search(text)]


def screenshot_of_graph(page: Page) -> bytes:
    """The whole graph as a PNG file, cropped to it, without the front end's menus."""
    style = page.add_style_tag(content=ONLY_THE_GRAPH)
    try:
        box = page.evaluate("(margin) => graphTools.fit(margin)", MARGIN)
        return page.screenshot(clip=box)
    finally:
        style.evaluate("(style) => style.remove()")
