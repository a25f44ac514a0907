"""Every shipped workflow in the real front end: it loads clean, looks good, and queues what we say it queues."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from comfyui.api import Client
from playwright.sync_api import Page

from .browser import (
    REPOSITORY,
    alerts,
    console_errors,
    describe,
    forget,
    graph_to_prompt,
    load_workflow,
    missing_nodes,
    red_nodes,
    screenshot_of_graph,
    without_titles,
)

Json = Any
FOLDER = REPOSITORY / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
OUR_PREFIX = "LongCatVideo"
# Nodes that only the front end knows.
FRONT_ENDS = {"MarkdownNote", "Note", "Reroute", "PrimitiveNode"}
CORES = ("nodes", "comfy_extras.")
TITLE = 30
TITLE_OF_GROUP = 24


@dataclass(frozen=True)
class Loaded:
    """A workflow after it was loaded: its file, and what the front end made of it."""

    file: Json = field(repr=False)
    drawn: Json = field(repr=False)
    prompt: Json = field(repr=False)
    missing: list[str]
    red: list[str]
    alerts: list[str]
    errors: list[str]
    picture: bytes = field(repr=False)


@dataclass(frozen=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.bottom <= other.top or other.bottom <= self.top)

    def contains(self, other: Box) -> bool:
        across = self.left <= other.left and other.right <= self.right
        return across and self.top <= other.top and other.bottom <= self.bottom

    @property
    def centre(self) -> Box:
        x, y = (self.left + self.right) / 2, (self.top + self.bottom) / 2
        return Box(x, y, x, y)


def box(item: Json, *, above: float = 0) -> Box:
    (x, y), (width, height) = item["pos"], item["size"]
    return Box(x, y - above, x + width, y + height)


_loaded: dict[str, Loaded] = {}


@pytest.fixture(params=NAMES)
def workflow(request: pytest.FixtureRequest, front_end: Page) -> Loaded:
    """Each is loaded once."""
    name = request.param
    if name not in _loaded:
        _loaded[name] = load(front_end, FOLDER / f"{name}.json")
    return _loaded[name]


def load(page: Page, path: Path) -> Loaded:
    forget(page)
    file = json.loads(path.read_text(encoding="utf-8"))
    load_workflow(page, file)
    page.wait_for_load_state("networkidle")  # pictures of loaders, looks for model files
    picture = screenshot_of_graph(page)
    state = (missing_nodes(page), red_nodes(page), alerts(page), console_errors(page))
    return Loaded(file, describe(page), graph_to_prompt(page), *state, picture)


def test_there_are_workflows() -> None:
    assert "first_run" in NAMES
    assert {path.stem for path in (FOLDER / "api").glob("*.json")} == set(NAMES)


def test_it_loads_clean(workflow: Loaded) -> None:
    assert workflow.missing == []
    assert workflow.red == []
    assert workflow.alerts == []
    assert workflow.errors == []


def test_it_queues_the_shipped_prompt(workflow: Loaded, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["workflow"]
    shipped = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
    assert without_titles(workflow.prompt) == without_titles(shipped)


def test_everything_of_the_file_is_drawn(workflow: Loaded) -> None:
    file, drawn = workflow.file, workflow.drawn
    assert {str(node["id"]): node["type"] for node in drawn["nodes"]} == {
        str(node["id"]): node["type"] for node in file["nodes"]
    }
    assert sorted(group["title"] for group in drawn["groups"]) == sorted(group["title"] for group in file["groups"])
    assert len(drawn["links"]) == len(file["links"])
    written = [node["widgets_values"][0] for node in file["nodes"] if node["type"].endswith("Note")]
    assert sorted(node["note"] for node in drawn["nodes"] if node["note"] is not None) == sorted(written)


def test_it_says_what_to_do(workflow: Loaded) -> None:
    notes = [node["note"] for node in workflow.drawn["nodes"] if node["note"]]
    assert notes and all(len(note) > 40 for note in notes)
    titles = [group["title"] for group in workflow.drawn["groups"]]
    assert titles and "Group" not in titles


def test_no_link_leads_nowhere(workflow: Loaded) -> None:
    assert [link for link in workflow.drawn["links"] if not link["whole"]] == []


def test_no_node_is_of_another_pack(workflow: Loaded, comfy: Client) -> None:
    known = comfy.object_info()
    for node in workflow.drawn["nodes"]:
        kind = node["type"]
        if kind in FRONT_ENDS or kind.startswith(OUR_PREFIX):
            continue
        assert known[kind]["python_module"].startswith(CORES), kind


def test_no_two_nodes_overlap(workflow: Loaded) -> None:
    boxes = [(node["title"], box(node, above=TITLE)) for node in workflow.drawn["nodes"]]
    groups = [(group["title"], box(group)) for group in workflow.drawn["groups"]]
    for items in (boxes, groups):
        assert [(a[0], b[0]) for a, b in combinations(items, 2) if a[1].overlaps(b[1])] == []


def test_nodes_lie_inside_their_group(workflow: Loaded) -> None:
    for group in workflow.drawn["groups"]:
        frame = box(group)
        inside = Box(frame.left, frame.top + TITLE_OF_GROUP, frame.right, frame.bottom)
        nodes = [(node["title"], box(node, above=TITLE)) for node in workflow.drawn["nodes"]]
        members = [(title, place) for title, place in nodes if frame.contains(place.centre)]
        assert members, f"nothing in {group['title']}"
        assert [title for title, place in members if not inside.contains(place)] == []
        assert [title for title, place in nodes if not frame.contains(place.centre) and frame.overlaps(place)] == []


def test_nothing_is_cut_off(workflow: Loaded) -> None:
    for node in workflow.drawn["nodes"]:
        for size, smallest in zip(node["size"], node["smallest"], strict=True):
            assert size >= smallest, (node["title"], node["size"], node["smallest"])
        assert node["cut"] == 0, f"{node['title']} hides a part of its text"


def test_its_picture_shows_it(workflow: Loaded) -> None:
    assert workflow.picture.startswith(b"\x89PNG")
    width, height = (int.from_bytes(workflow.picture[at : at + 4]) for at in (16, 20))
    assert width > 640 and height > 320
