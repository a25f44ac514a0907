"""The ground the front-end tests stand on: what is wrong is seen, and what others did is not blamed on us."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comfyui.api import Client
from playwright.sync_api import Page

from . import browser
from .browser import alerts, console_errors, graph_to_prompt, load_workflow, missing_nodes, red_nodes, saved_workflow

STOCK = {
    "1": {"class_type": "EmptyHunyuanLatentVideo", "inputs": {"width": 64, "height": 32, "length": 5, "batch_size": 1}},
    "2": {"class_type": "LatentMultiply", "inputs": {"samples": ["1", 0], "multiplier": 0.5}},
    "3": {"class_type": "SaveLatent", "inputs": {"samples": ["2", 0], "filename_prefix": "latents/ui"}},
}


def test_the_front_end_starts_without_an_error(front_end: Page) -> None:
    assert console_errors(front_end) == []
    assert alerts(front_end) == []


def test_a_stock_graph_goes_round(page: Page) -> None:
    page.evaluate("(prompt) => app.loadApiJson(prompt, 'stock')", STOCK)
    drawn = graph_to_prompt(page)
    assert {key: (node["class_type"], node["inputs"]) for key, node in drawn.items()} == {
        key: (node["class_type"], node["inputs"]) for key, node in STOCK.items()
    }
    saved = saved_workflow(page)
    load_workflow(page, saved)
    assert graph_to_prompt(page) == drawn
    assert (missing_nodes(page), red_nodes(page), alerts(page), console_errors(page)) == ([], [], [], [])


def test_a_node_that_nobody_has_is_missing_and_red(page: Page) -> None:
    page.evaluate("(prompt) => app.loadApiJson(prompt, 'stock')", STOCK)
    saved = saved_workflow(page)
    saved["nodes"][1]["type"] = "NobodyHasThis"
    load_workflow(page, saved)
    assert missing_nodes(page) == ["NobodyHasThis"]
    assert len(red_nodes(page)) == 1
    assert alerts(page)


def test_a_node_that_the_server_refuses_is_red(page: Page) -> None:
    wrong = STOCK | {"2": {"class_type": "LatentMultiply", "inputs": {"multiplier": 0.5}}}
    page.evaluate("(prompt) => app.loadApiJson(prompt, 'stock')", wrong)
    assert red_nodes(page) == []
    page.evaluate("() => app.queuePrompt(0, 1).catch(() => null)")
    assert len(red_nodes(page)) == 1


def test_a_workflow_of_the_wrong_shape_alerts(page: Page) -> None:
    load_workflow(page, {"version": 0.4, "nodes": [], "links": [], "groups": None, "last_node_id": "x"})
    assert alerts(page)


def test_errors_are_counted_and_the_outside_is_not(page: Page, comfy: Client) -> None:
    page.evaluate("() => fetch('https://example.org/').catch(() => null)")
    page.evaluate("() => fetch('/user.css')")
    page.wait_for_timeout(100)
    assert console_errors(page) == []
    page.evaluate("() => fetch('/nowhere')")
    page.evaluate("() => console.error('one')")
    page.evaluate("() => { setTimeout(() => { throw new Error('two'); }) }")
    page.wait_for_timeout(100)
    first, second, third = console_errors(page)
    assert first.endswith(f"{comfy.server.url}/nowhere")
    assert (second, third.split("\n")[0]) == ("one", "Error: two")


def test_chromium_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "my-chromium"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("CHROMIUM", str(program))
    assert browser.find_chromium() == program
    monkeypatch.setenv("CHROMIUM", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="is no program"):
        browser.find_chromium()


def test_without_a_chromium_the_unpacked_one_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(browser, "UNPACKED", tmp_path)
    assert browser.find_chromium() is None
    (tmp_path / "chromium").touch()
    assert browser.find_chromium() == tmp_path / "chromium"
    variables = browser.environment(tmp_path / "chromium")
    assert str(variables["LD_LIBRARY_PATH"]).startswith(str(tmp_path))


def test_saved_settings_are_those_of_the_page(page: Page) -> None:
    shown = page.evaluate("() => app.extensionManager.setting.get('Comfy.ColorPalette')")
    assert shown == browser.SETTINGS["Comfy.ColorPalette"] == "dark"
    assert json.dumps(browser.SETTINGS)
