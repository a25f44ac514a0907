"""The help pages of the nodes: one per node and language, saying only what the nodes' source says.

The front end asks for docs/NODE_ID/LANGUAGE.md, then for docs/NODE_ID.md, and takes pictures from docs/ for both.
"""

from __future__ import annotations

import ast
import json
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from comfyui.api import Client
from comfyui.fixtures import comfy, comfy_core
from comfyui.server import PACK
from PIL import Image

__all__ = ["comfy", "comfy_core"]

ROOT = Path(__file__).resolve().parents[1]
NODES = ROOT / "comfy_nodes"
DOCS = NODES / "web" / "docs"
TRANSLATIONS = ("de", "zh")
LANGUAGES = ("en", *TRANSLATIONS)
LARGEST_PICTURE = 40_000  # bytes: every installation has them

PICTURE = re.compile(r"!\[[^\]]+\]\(([^)]+)\)")
# A list entry that begins with `message with spaces`.
MESSAGE = re.compile(r"^- `([^`]* [^`]*)`", re.MULTILINE)
# A list entry that begins with input names: `one`, `two`: (English), or **Label**, **Label** (`one`, `two`).
INPUTS = re.compile(
    r"^- (?:(?P<labels>\*\*[^(（]+\*\*) ?[(（])?(?P<names>`\w+`(?:[,、] ?`\w+`)*)[)）]?[:：]", re.MULTILINE
)


@dataclass(frozen=True)
class Schema:
    """What a node's source says."""

    display_name: str
    inputs: tuple[str, ...]


def functions(tree: ast.AST) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def inputs_in(part: ast.AST, local: dict[str, ast.FunctionDef], shared: dict[str, ast.FunctionDef]) -> Iterator[str]:
    """Names of `io.X.Input("name")`, and of those that functions called here make."""
    for call in (node for node in ast.walk(part) if isinstance(node, ast.Call)):
        match call.func:
            case ast.Attribute(attr="Input"):
                yield str(ast.literal_eval(call.args[0]))
            case ast.Attribute(value=ast.Name(id="inputs"), attr=name):
                yield from inputs_in(shared[name], shared, shared)
            case ast.Name(id=name) if name in local:
                yield from inputs_in(local[name], local, shared)


@cache
def schemas() -> dict[str, Schema]:
    """Node id -> what its `define_schema` says."""
    shared = functions(ast.parse((NODES / "inputs.py").read_text(encoding="utf-8")))
    found = {}
    for path in NODES.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            schema = functions(node).get("define_schema")
            if schema is None:
                continue
            call = next(c for c in ast.walk(schema) if isinstance(c, ast.Call) and ast.unparse(c.func) == "io.Schema")
            said = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
            inputs = tuple(inputs_in(schema, functions(tree), shared))
            found[str(said["node_id"])] = Schema(str(said["display_name"]), inputs)
    return found


@cache
def messages() -> tuple[str, ...]:
    """All texts of the source, with … for what is filled in."""
    found = []
    for path in (*NODES.rglob("*.py"), *(ROOT / "lcv_core").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub("%[ds]", "…", node.value))
    return tuple(found)


def page_path(node_id: str, language: str) -> Path:
    return DOCS / f"{node_id}.md" if language == "en" else DOCS / node_id / f"{language}.md"


def page(node_id: str, language: str) -> str:
    return page_path(node_id, language).read_text(encoding="utf-8")


def locale(language: str, node_id: str) -> dict[str, Any]:
    """A node's entry of a locale file."""
    path = ROOT / "locales" / language / "nodeDefs.json"
    return json.loads(path.read_text(encoding="utf-8"))[node_id]


def input_entries(text: str) -> list[tuple[str, ...]]:
    """The input names of each list entry that is about inputs."""
    return [tuple(re.findall(r"`(\w+)`", found["names"])) for found in INPUTS.finditer(text)]


EVERY_PAGE = pytest.mark.parametrize(
    ("node_id", "language"), [(node_id, language) for node_id in sorted(schemas()) for language in LANGUAGES]
)
EVERY_TRANSLATION = pytest.mark.parametrize(
    ("node_id", "language"), [(node_id, language) for node_id in sorted(schemas()) for language in TRANSLATIONS]
)


def test_every_node_has_a_page_in_every_language_and_there_are_no_others() -> None:
    assert len(schemas()) == 13
    wanted = {page_path(node_id, language) for node_id in schemas() for language in LANGUAGES}
    assert set(DOCS.rglob("*.md")) == wanted


@EVERY_PAGE
def test_a_page_is_headed_by_the_name_that_the_node_shows(node_id: str, language: str) -> None:
    name = schemas()[node_id].display_name if language == "en" else locale(language, node_id)["display_name"]
    assert page(node_id, language).startswith(f"# {name}\n")


@EVERY_PAGE
def test_a_page_names_inputs_that_the_node_has(node_id: str, language: str) -> None:
    named = [name for entry in input_entries(page(node_id, language)) for name in entry]
    assert named, "no input is explained"
    assert set(named) <= set(schemas()[node_id].inputs)
    assert len(named) == len(set(named))


@EVERY_PAGE
def test_a_page_quotes_messages_that_the_code_has(node_id: str, language: str) -> None:
    for quoted in MESSAGE.findall(page(node_id, language)):
        pieces = [re.escape(piece.strip()) for piece in quoted.split("…")]
        pattern = re.compile(".*".join(pieces), re.DOTALL)
        assert any(pattern.search(text) for text in messages()), f"no message says: {quoted}"


@EVERY_PAGE
def test_a_page_shows_its_node_and_all_its_pictures_exist(node_id: str, language: str) -> None:
    shown = PICTURE.findall(page(node_id, language))
    assert f"assets/{node_id}.png" in shown
    for name in shown:
        assert (DOCS / name).is_file(), name


def test_every_picture_is_used_and_light() -> None:
    used = {DOCS / name for node_id in schemas() for name in PICTURE.findall(page(node_id, "en"))}
    assert set((DOCS / "assets").iterdir()) == used
    for path in used:
        assert path.stat().st_size <= LARGEST_PICTURE, path.name
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width >= 400, path.name


@EVERY_TRANSLATION
def test_a_translation_has_all_that_the_english_page_has(node_id: str, language: str) -> None:
    english, translated = page(node_id, "en"), page(node_id, language)
    assert input_entries(translated) == input_entries(english)
    assert MESSAGE.findall(translated) == MESSAGE.findall(english)
    assert translated.count("\n## ") == english.count("\n## ")
    assert translated.count("\n- ") == english.count("\n- ")


@EVERY_TRANSLATION
def test_a_translation_calls_inputs_what_the_node_calls_them(node_id: str, language: str) -> None:
    labels = locale(language, node_id)["inputs"]
    for found in INPUTS.finditer(page(node_id, language)):
        names = re.findall(r"`(\w+)`", found["names"])
        assert re.findall(r"\*\*(.+?)\*\*", found["labels"]) == [labels[name]["name"] for name in names]


@EVERY_PAGE
def test_comfyui_serves_the_page_where_the_front_end_asks(comfy: Client, node_id: str, language: str) -> None:
    place = page_path(node_id, language).relative_to(DOCS).as_posix()
    with urllib.request.urlopen(f"{comfy.server.url}/extensions/{PACK}/docs/{place}", timeout=30) as answer:
        assert answer.headers.get_content_type() != "text/html"  # the front end takes that for an error page
        assert answer.read() == page_path(node_id, language).read_bytes()
