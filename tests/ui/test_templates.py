"""The workflows as ComfyUI's template browser offers them."""

from __future__ import annotations

import io
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from comfyui.api import Client
from comfyui.server import PACK
from PIL import Image
from playwright.sync_api import Locator, Page

from .browser import REPOSITORY, alerts, console_errors, graph_to_prompt, without_titles

FOLDER = REPOSITORY / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
CARD = (640, 360)
# Older front ends do not ask the pack's locales, and show its folder's name.
OUR_NAME = re.compile(f"^(LongCat-Video|{PACK})$")
# ComfyUI keeps its own templates in a package that the tests do without.
CORES_TEMPLATES = "**/templates/index*.json"


def fetch(comfy: Client, path: str) -> bytes:
    with urllib.request.urlopen(f"{comfy.server.url}/api/workflow_templates/{PACK}/{path}", timeout=30) as answer:
        return answer.read()


def test_all_workflows_are_listed_and_nothing_else(comfy: Client) -> None:
    # Not those of workflows/api: queued prompts, which a template browser cannot show.
    assert sorted(comfy.get("/api/workflow_templates")[PACK]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_template_and_its_picture_are_served(comfy: Client, name: str) -> None:
    assert json.loads(fetch(comfy, f"{name}.json")) == json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    with Image.open(io.BytesIO(fetch(comfy, f"{name}.jpg"))) as picture:
        assert (picture.format, picture.size) == ("JPEG", CARD)
        extrema = picture.convert("L").getextrema()
    assert extrema[1] - extrema[0] > 100  # something is on it


def test_a_template_that_is_not_there_is_not_served(comfy: Client) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetch(comfy, "nowhere.json")


@pytest.fixture
def templates(page: Page) -> Iterator[Locator]:
    """The open template browser."""
    page.route(CORES_TEMPLATES, lambda route: route.fulfill(json=[]))
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text(OUR_NAME).first.click()
    yield dialog
    page.keyboard.press("Escape")
    close = dialog.locator("button:has(.pi-times)")  # 1.32 does not close it by key
    if close.count():
        close.first.click()
    page.unroute(CORES_TEMPLATES)


def test_the_template_browser_shows_pictures(templates: Locator, page: Page) -> None:
    for name in NAMES:
        # A picture is fetched when it comes into view; it is above the name.
        templates.get_by_text(name, exact=True).first.evaluate("(title) => title.scrollIntoView({ block: 'end' })")
        picture = templates.locator(f"img[alt='{name}']").first
        page.wait_for_function("(image) => image.naturalWidth > 0", arg=picture.element_handle())


def test_a_click_on_a_template_opens_it(templates: Locator, page: Page) -> None:
    templates.locator("img[alt='first_run']").first.click()
    page.wait_for_function("() => app.canvas.graph._nodes.some((node) => node.type === 'LongCatVideoLoader')")
    templates.wait_for(state="hidden")
    shipped = json.loads((FOLDER / "api" / "first_run.json").read_text("utf-8"))
    assert without_titles(graph_to_prompt(page)) == without_titles(shipped)
    assert console_errors(page) == []
    assert alerts(page) == []
