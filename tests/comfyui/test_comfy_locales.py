"""The locales say all that the nodes say, in every language, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from .api import Client
from .server import PACK, REPOSITORY

LOCALES = REPOSITORY / "locales"
TRANSLATIONS = ("de", "zh")
# The front end reads these as its own syntax: placeholders, linked messages, plurals.
FORMATTING = re.compile(r"[{}@|]")
# What is the same in every language: numbers, folders, and the names of file formats, models and packages.
FIXED = re.compile(
    r"\d+(?:\.\d+)?|models/\w+|4k\+1|fp8|bf16|CFG-Zero|PSNR|GGUF|LoRA|VAE|CLIP|Triton|\b(?:Wan|NVIDIA|ComfyUI|LongCat)\b"
)

Defs = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def schemas(comfy: Client) -> Defs:
    """Node id -> its entry of /object_info, of this pack."""
    found = {name: info for name, info in comfy.object_info().items() if info["category"].startswith("LongCat-Video")}
    assert "LongCatVideoLoader" in found
    return found


def read(language: str, name: str = "nodeDefs") -> dict[str, Any]:
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


def in_english(info: dict[str, Any]) -> dict[str, Any]:
    """A schema as a locale file has it. An output named as its type is translated by the front end itself."""
    outputs = zip(info["output"], info["output_name"], info["output_tooltips"], strict=True)
    entry = {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {name: named(name, spec[1].get("tooltip")) for name, spec in input_specs(info)},
        "outputs": {str(i): named(name, tip) for i, (kind, name, tip) in enumerate(outputs) if tip or name != kind},
    }
    return {key: value for key, value in entry.items() if value}


def named(name: str, tooltip: str | None) -> dict[str, str]:
    return {"name": name} | ({"tooltip": tooltip} if tooltip else {})


def texts(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text of a locale file, with the keys that lead to it."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from texts(value, (*path, key))
        else:
            yield (*path, key), value


def combos(schemas: Defs) -> dict[tuple[str, str], set[str]]:
    """(node id, input) -> the options of every choice; these stay English in every language."""
    specs = ((node, name, spec) for node, info in schemas.items() for name, spec in input_specs(info))
    return {(node, name): set(spec[1].get("options") or spec[0]) for node, name, spec in specs if is_combo(spec)}


def input_specs(info: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for part in ("required", "optional"):
        yield from info["input"].get(part, {}).items()


def is_combo(spec: list[Any]) -> bool:
    return spec[0] == "COMBO" or isinstance(spec[0], list)


def test_english_is_what_the_schemas_say(schemas: Defs) -> None:
    assert read("en") == {node: in_english(info) for node, info in schemas.items()}


def test_there_are_no_languages_half_done() -> None:
    assert {folder.name for folder in LOCALES.iterdir()} == {"en", *TRANSLATIONS}
    for language in TRANSLATIONS:
        assert {file.name for file in (LOCALES / language).iterdir()} == {"main.json", "nodeDefs.json"}


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_every_text_is_translated(language: str) -> None:
    english, translated = dict(texts(read("en"))), dict(texts(read(language)))
    assert set(translated) == set(english)
    assert not [path for path, text in translated.items() if not text.strip() or text != text.strip()]
    sentences = [path for path in english if path[-1] in ("description", "tooltip")]
    assert not [path for path in sentences if translated[path] == english[path]]


def test_chinese_is_chinese() -> None:
    sentences = {path: text for path, text in texts(read("zh")) if path[-1] in ("description", "tooltip")}
    assert not [path for path, text in sentences.items() if not re.search(r"[\u4e00-\u9fff]", text)]


@pytest.mark.parametrize("language", ("en", *TRANSLATIONS))
def test_the_front_end_shows_the_texts_as_they_are(language: str) -> None:
    assert not [path for path, text in texts(read(language)) if FORMATTING.search(text)]


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_numbers_folders_and_names_survive(language: str) -> None:
    translated = dict(texts(read(language)))
    lost = {path: fixed_parts(text) - fixed_parts(translated[path]) for path, text in texts(read("en"))}
    assert not {path: parts for path, parts in lost.items() if parts}


def fixed_parts(text: str) -> set[str]:
    return set(FIXED.findall(re.sub(r"(\d),(\d)", r"\1.\2", text)))  # a decimal comma


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_choices_are_called_by_the_names_in_their_list(schemas: Defs, language: str) -> None:
    english, translated, seen = read("en"), read(language), set()
    for (node, name), options in combos(schemas).items():
        before, after = (defs[node]["inputs"][name]["tooltip"] for defs in (english, translated))
        explained = {option for option in options if re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", before)}
        assert explained == {option for option in explained if option in after}, (node, name)
        seen |= explained
    assert {"base", "distilled", "auto", "none", "default", "latents", "crop", "space and time"} <= seen


def test_comfyui_serves_them(comfy: Client) -> None:
    served = comfy.get("/i18n")
    for language in ("en", *TRANSLATIONS):
        ours = {node: served[language]["nodeDefs"].get(node) for node in read(language)}
        assert ours == read(language)
        assert served[language]["templateWorkflows"]["category"][PACK] == "LongCat-Video"
