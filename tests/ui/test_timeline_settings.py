"""The segment timeline under other settings of the front end: languages, colours, nodes drawn by Vue."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from .browser import alerts, another_page, console_errors, forget, graph_to_prompt, load_workflow, saved_workflow
from .timeline import THREE, Timeline, add_node, show

VERSION = "() => (window.__COMFYUI_FRONTEND_VERSION__ ?? '0.0').split('.').map(Number)"
SET = "([name, value]) => app.extensionManager.setting.set(name, value)"
GET = "(name) => app.extensionManager.setting.get(name)"
PALETTES = ("dark", "light", "solarized", "arc", "nord", "github")
# Of text on what is behind it, as WCAG 2 has it.
CONTRAST = """(element) => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const bytes = (...colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const behind = [];
  for (let place = element; place; place = place.parentElement) behind.unshift(getComputedStyle(place).backgroundColor);
  const node = LiteGraph.NODE_DEFAULT_BGCOLOR;
  const light = (colour) => colour.slice(0, 3).map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  const [a, b] = [light(bytes(node, ...behind)), light(bytes(node, ...behind, getComputedStyle(element).color))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


def three_prompts(page: Page) -> Timeline:
    show(page)
    return Timeline(page, add_node(page, prompts="\n".join(THREE)))


def test_chinese(front_end: Page) -> None:
    with another_page(front_end, settings={"Comfy.Locale": "zh"}) as page:
        timeline = three_prompts(page)
        expect(timeline.total).to_have_text("3 段 · 16.9 秒")
        expect(page.get_by_role("group", name="片段，每段一条提示词")).to_be_visible()
        expect(timeline.cards.nth(1)).to_have_attribute("aria-label", "第 2 段，共 3 段, 6.2 – 11.5 秒")
        timeline.button("添加片段").click()
        expect(timeline.said).to_have_text("已添加第 4 张卡片")
        assert (console_errors(page), alerts(page)) == ([], [])


def test_german(front_end: Page) -> None:
    with another_page(front_end, settings={"Comfy.Locale": "de"}) as page:
        if page.evaluate(GET, "Comfy.Locale") != "de":
            pytest.skip("this front end has no German, and turns the setting to another language")
        timeline = three_prompts(page)
        expect(timeline.total).to_have_text("3 Segmente · 16,9 s")
        timeline.set(num_segments=5)
        expect(timeline.total).to_have_text("3 Prompts, aber „Segmente“ ist 5")
        timeline.button("Segment hinzufügen").click()
        expect(timeline.said).to_have_text("Karte 4 hinzugefügt")
        assert (console_errors(page), alerts(page)) == ([], [])


def test_every_language_has_every_word(page: Page) -> None:
    url = page.evaluate("() => [...document.styleSheets].find((sheet) => /timeline\\.css$/.test(sheet.href)).href")
    words = """async ([url, locale]) => {
      const { translator } = await import(new URL("./strings.js", url));
      const words = translator(locale);
      const values = { n: 1, count: 2, prompts: 3, value: 1234.5, start: 0, end: 1.25 };
      return ["timeline", "segment", "lone", "empty", "prompt", "placeholder", "add", "duplicate", "remove", "grip",
        "asText", "asCards", "seconds", "span", "one", "many", "none", "unknown", "conflict", "added", "removed",
        "moved", "finished", "isDone", "undone", "redone"].map((key) => words(key, values));
    }"""
    made = {locale: page.evaluate(words, [url, locale]) for locale in ("en", "de", "zh", "zh-TW", "fr")}
    assert not any(re.search("[{}]|undefined", word) for texts in made.values() for word in texts)
    same = [en for en, de, zh in zip(made["en"], made["de"], made["zh"], strict=True) if zh == en]
    assert same == []
    assert made["fr"][0] == made["en"][0] and made["zh-TW"] == made["zh"]
    assert "1.234,5 s" in made["de"] and "1,234.5 s" in made["en"]


@pytest.fixture
def colours(page: Page) -> Iterator[Page]:
    yield page
    page.evaluate(SET, ["Comfy.ColorPalette", "dark"])


def test_texts_can_be_read_in_every_theme(colours: Page) -> None:
    timeline = three_prompts(colours)
    timeline.must_have(*THREE)
    for palette in PALETTES:
        colours.evaluate(SET, ["Comfy.ColorPalette", palette])
        timeline.frames(3)
        assert timeline.texts.nth(0).evaluate(CONTRAST) >= 4.5, palette
        for muted in (timeline.total, timeline.root.locator(".lcv-when span").nth(0)):
            assert muted.evaluate(CONTRAST) >= 3, palette


@pytest.fixture(scope="module")
def vue_page(front_end: Page) -> Iterator[Page]:
    with another_page(front_end, settings={"Comfy.VueNodes.Enabled": True}) as page:
        yield page


@pytest.fixture
def vue(vue_page: Page) -> Iterator[Timeline]:
    """A node drawn by Vue."""
    forget(vue_page)
    yield three_prompts(vue_page)
    assert (console_errors(vue_page), alerts(vue_page)) == ([], [])


def need_elements(page: Page) -> None:
    if page.evaluate(VERSION) < [1, 37]:
        pytest.skip("the Vue nodes of this front end do not show elements of extensions")


def test_vue_nodes_that_show_no_elements_have_the_text(vue: Timeline) -> None:
    page = vue.page
    if page.evaluate(VERSION) >= [1, 37]:
        pytest.skip("the Vue nodes of this front end show elements of extensions")
    expect(page.locator(".lg-node textarea").first).to_have_value("one\ntwo\nthree")
    assert page.locator(".lcv-timeline").count() == 0


def test_cards_in_a_vue_node(vue: Timeline) -> None:
    page = vue.page
    need_elements(page)
    expect(page.locator(".lg-node .lcv-timeline")).to_have_count(1)
    vue.must_have(*THREE)
    vue.put_caret(0, 3)
    vue.press("Enter")
    vue.type("new")
    vue.drag(0, over=2)
    vue.must_have("new", "two", "one", "three")
    vue.put_caret(3, 0)
    vue.press("Backspace", "Control+d")
    vue.must_have("new", "two", "onethree", "onethree")
    vue.press("Control+z", "Control+z")
    vue.must_have("new", "two", "one", "three")
    assert graph_to_prompt(page)[vue.node]["inputs"]["prompts"] == "new\ntwo\none\nthree"
    saved = saved_workflow(page)
    load_workflow(page, saved)
    vue.must_have("new", "two", "one", "three")
    vue.put_caret(1, 3)
    vue.type("!")
    vue.must_have("new", "two!", "one", "three")


def test_the_text_of_a_vue_node(vue: Timeline) -> None:
    page = vue.page
    need_elements(page)
    vue.must_have(*THREE)
    field = page.locator(".lg-node textarea:not(.lcv-timeline *)")
    expect(field).to_have_count(1)  # the negative prompt
    vue.button("Edit as text").click()
    expect(field).to_have_count(2)
    expect(field.first).to_have_value("one\ntwo\nthree")
    field.first.fill("a\nb")
    expect(vue.total).to_have_text("2 segments · 11.5 s")
    vue.button("Edit as segments").click()
    expect(field).to_have_count(1)
    vue.must_have("a", "b")


def test_a_vue_node_keeps_its_height(vue: Timeline) -> None:
    need_elements(vue.page)
    vue.must_have(*THREE)
    vue.set(prompts="\n".join(map(str, range(40))))
    expect(vue.texts).to_have_count(40)
    box = vue.root.bounding_box()
    assert box and box["height"] <= 340
    vue.strip.nth(39).click()
    vue.caret_is(39, 2)


def test_from_one_kind_of_node_to_the_other(vue: Timeline) -> None:
    page = vue.page
    need_elements(page)
    vue.must_have(*THREE)
    page.evaluate(SET, ["Comfy.VueNodes.Enabled", False])
    try:
        expect(page.locator(".dom-widget .lcv-timeline")).to_be_visible()
        vue.put_caret(0, 3)
        vue.type("!")
        vue.must_have("one!", "two", "three")
    finally:
        page.evaluate(SET, ["Comfy.VueNodes.Enabled", True])
    expect(page.locator(".lg-node .lcv-timeline")).to_be_visible()
    vue.put_caret(0, 4)
    vue.type("!")
    vue.must_have("one!!", "two", "three")
