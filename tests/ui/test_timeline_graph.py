"""The segment timeline as a part of a graph: saved, queued, copied, undone, linked, inside others."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from .browser import (
    REPOSITORY,
    another_page,
    forget,
    graph_to_prompt,
    load_workflow,
    saved_workflow,
)
from .timeline import OPEN, THREE, TO_SUBGRAPH, Timeline, add_node, show

Json = Any
OURS = "**/js/timeline.js"
WITH_A_TIMELINE = ("interactive", "long_video")


def only_node(page: Page) -> Json:
    """The one node of the graph, as it is saved."""
    (node,) = saved_workflow(page)["nodes"]
    return node


def shipped(name: str) -> Json:
    return json.loads((REPOSITORY / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def without_the_extension(front_end: Page) -> dict[str, tuple[Json, Json]]:
    """Name of a workflow -> what a front end without the timeline saves and queues."""
    made = {}
    with another_page(front_end, instead={OURS: ""}) as page:
        for name in WITH_A_TIMELINE:
            load_workflow(page, shipped(name))
            assert page.locator(".lcv-timeline").count() == 0
            made[name] = (saved_workflow(page)["nodes"], graph_to_prompt(page))
    return made


@pytest.mark.parametrize("name", WITH_A_TIMELINE)
def test_nothing_more_is_saved_or_queued(without_the_extension: dict[str, Any], page: Page, name: str) -> None:
    nodes, prompt = without_the_extension[name]
    load_workflow(page, shipped(name))
    expect(page.locator(".lcv-timeline")).to_have_count(1)
    assert graph_to_prompt(page) == prompt
    for saved, plain in zip(saved_workflow(page)["nodes"], nodes, strict=True):
        assert saved.get("widgets_values") == plain.get("widgets_values")
        assert saved.get("widgets_values_named") == plain.get("widgets_values_named")
        assert saved["inputs"] == plain["inputs"]
        assert saved["properties"] == plain["properties"]


def test_an_edited_workflow_comes_back(timeline: Timeline) -> None:
    page = timeline.page
    timeline.set(negative_prompt="blurred", num_steps=7, seed=11)
    timeline.put_caret(1, 3)
    timeline.press("Enter")
    timeline.type("new")
    saved, prompt = saved_workflow(page), graph_to_prompt(page)
    forget(page)
    load_workflow(page, saved)
    timeline.must_have("one", "two", "new", "three")
    assert (timeline.get("negative_prompt"), timeline.get("num_steps"), timeline.get("seed")) == ("blurred", 7, 11)
    assert graph_to_prompt(page) == prompt
    assert saved_workflow(page)["nodes"] == saved["nodes"]


def test_a_new_node_keeps_its_seed(timeline: Timeline) -> None:
    page = timeline.page
    assert timeline.get("control_after_generate") == "fixed"
    for kind, control in (("LongCatVideoRefine", "fixed"), ("KSampler", "randomize")):
        other = Timeline(page, add_node(page, kind=kind, at=(-500, 100)))
        assert other.get("control_after_generate") == control
    timeline.set(control_after_generate="randomize")  # what a user chooses stays
    load_workflow(page, saved_workflow(page))
    assert timeline.get("control_after_generate") == "randomize"


def test_the_front_ends_own_undo(timeline: Timeline) -> None:
    page = timeline.page
    load_workflow(page, saved_workflow(page))  # where its history begins
    timeline.button("Add segment").click()
    timeline.type("four")
    page.evaluate("() => document.activeElement.blur()")
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Undo')")
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Undo')")
    timeline.must_have(*THREE)
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Redo')")
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Redo')")
    timeline.must_have(*THREE, "four")
    timeline.put_caret(0, 3)
    timeline.type("!")
    timeline.must_have("one!", "two", "three", "four")


def test_a_pasted_node_is_another(timeline: Timeline) -> None:
    page = timeline.page
    page.evaluate("(id) => app.canvas.selectNode(app.canvas.graph.getNodeById(id))", int(timeline.node))
    page.evaluate("() => { app.canvas.copyToClipboard(); app.canvas.pasteFromClipboard(); }")
    expect(page.locator(".lcv-timeline")).to_have_count(2)
    ids = page.evaluate("() => app.canvas.graph._nodes.map((node) => String(node.id))")
    (other,) = set(ids) - {timeline.node}
    page.evaluate("(id) => { app.canvas.graph.getNodeById(id).pos = [800, 100]; }", int(other))
    show(page)
    copy = Timeline(page, other, place=1)
    copy.must_have(*THREE)
    copy.put_caret(0, 3)
    copy.type(" again")
    copy.must_have("one again", "two", "three")
    timeline.must_have(*THREE)
    timeline.put_caret(2, 0)
    timeline.press("Backspace")
    timeline.must_have("one", "twothree")
    copy.must_have("one again", "two", "three")
    queued = [node["inputs"]["prompts"] for node in graph_to_prompt(page).values()]
    assert set(queued) == {"one again\ntwo\nthree", "one\ntwothree"}


def test_a_node_that_goes_takes_its_timeline_along(timeline: Timeline) -> None:
    page = timeline.page
    page.evaluate("(id) => app.canvas.graph.remove(app.canvas.graph.getNodeById(id))", int(timeline.node))
    expect(page.locator(".lcv-timeline")).to_have_count(0)


def test_a_collapsed_node_hides_it(timeline: Timeline) -> None:
    page = timeline.page
    collapse = "(id) => { app.canvas.graph.getNodeById(id).collapse(); app.canvas.setDirty(true, true); }"
    page.evaluate(collapse, int(timeline.node))
    expect(timeline.root).to_be_hidden()
    page.evaluate(collapse, int(timeline.node))
    expect(timeline.root).to_be_visible()
    timeline.must_have(*THREE)


CONNECT = """([from, to]) => {
  const { graph } = app.canvas;
  const target = graph.getNodeById(to);
  const input = target.inputs.findIndex((one) => one.name === "prompts");
  graph.getNodeById(from).connect(0, target, input);
}"""
DISCONNECT = """(id) => {
  const node = app.canvas.graph.getNodeById(id);
  node.disconnectInput(node.inputs.findIndex((one) => one.name === "prompts"));
}"""


def test_linked_prompts_have_no_cards(timeline: Timeline) -> None:
    page = timeline.page
    text = add_node(page, kind="PrimitiveStringMultiline", at=(-500, 100), value="by link")
    page.evaluate(CONNECT, [int(text), int(timeline.node)])
    expect(timeline.root).to_be_hidden()
    assert not timeline.widgets()["prompts"]["hidden"]
    assert graph_to_prompt(page)[timeline.node]["inputs"]["prompts"] == [text, 0]
    page.evaluate(DISCONNECT, int(timeline.node))
    expect(timeline.root).to_be_visible()
    timeline.must_have(*THREE)
    assert timeline.widgets()["prompts"]["hidden"]


def test_the_socket_of_the_prompts_is_beside_the_cards(timeline: Timeline) -> None:
    where = "(id) => app.canvas.graph.getNodeById(id).getInputPos("
    where += "app.canvas.graph.getNodeById(id).inputs.findIndex((one) => one.name === 'prompts'))[1]"
    y = timeline.page.evaluate(where, int(timeline.node)) - 100
    top = timeline.widgets()["lcv_timeline"]["y"]
    assert top <= y <= timeline.widgets()["negative_prompt"]["y"]


def test_prompts_as_text(timeline: Timeline) -> None:
    page = timeline.page
    timeline.button("Edit as text").click()
    expect(timeline.cards.nth(0)).to_be_hidden()
    assert not timeline.widgets()["prompts"]["hidden"]
    # The text field and the negative prompt; a row with the way back.
    values = page.evaluate(
        "() => [...document.querySelectorAll('textarea')].filter((one) => one.checkVisibility())"
        ".map((one) => one.value)"
    )
    assert "one\ntwo\nthree" in values
    expect(timeline.total).to_be_visible()
    timeline.set(prompts="one\ntwo")
    expect(timeline.total).to_have_text("2 segments · 11.5 s")
    assert only_node(page)["properties"]["Prompts view"] == "text"
    saved = saved_workflow(page)
    forget(page)
    load_workflow(page, saved)
    expect(timeline.button("Edit as segments")).to_be_visible()
    timeline.button("Edit as segments").click()
    timeline.must_have("one", "two")
    assert "Prompts view" not in only_node(page)["properties"]


def test_the_view_is_a_property(timeline: Timeline) -> None:
    page = timeline.page
    page.evaluate("(id) => app.canvas.graph.getNodeById(id).setProperty('Prompts view', 'text')", int(timeline.node))
    expect(timeline.cards.nth(0)).to_be_hidden()
    page.evaluate("(id) => app.canvas.graph.getNodeById(id).setProperty('Prompts view', 'cards')", int(timeline.node))
    expect(timeline.cards.nth(0)).to_be_visible()


def test_inside_a_subgraph(timeline: Timeline) -> None:
    page = timeline.page
    loader = add_node(page, kind="LongCatVideoLoader", at=(-500, 100), checkpoint="miniature (built in)")
    link = "([from, to]) => app.canvas.graph.getNodeById(from).connect(0, app.canvas.graph.getNodeById(to), 0)"
    page.evaluate(link, [int(loader), int(timeline.node)])
    host = page.evaluate(TO_SUBGRAPH, [int(timeline.node)])
    page.evaluate(OPEN, int(host))
    show(page)
    inside = Timeline(page, page.evaluate("() => String(app.canvas.graph._nodes[0].id)"))
    expect(inside.root).to_be_visible()
    inside.must_have(*THREE)
    # The model is outside: the miniature's own 17 frames.
    expect(inside.total).to_have_text("3 segments · 2.2 s")
    inside.put_caret(0, 3)
    inside.press("Enter")
    inside.type("new")
    inside.must_have("one", "new", "two", "three")
    page.evaluate("() => app.canvas.setGraph(app.rootGraph ?? app.graph)")
    inner = [node for key, node in graph_to_prompt(page).items() if node["class_type"] == "LongCatVideoLong"]
    assert [node["inputs"]["prompts"] for node in inner] == ["one\nnew\ntwo\nthree"]
    saved = saved_workflow(page)
    forget(page)
    load_workflow(page, saved)
    page.evaluate(OPEN, int(host))
    show(page)
    inside.must_have("one", "new", "two", "three")
    page.evaluate("() => app.canvas.setGraph(app.rootGraph ?? app.graph)")


EXPOSE = """(id) => {
  const { graph } = app.canvas;
  const node = graph._nodes[0];
  const input = node.inputs.find((one) => one.name === "prompts");
  graph.inputNode.emptySlot.connect(input, node);
}"""


def test_prompts_that_a_subgraph_shows_outside(timeline: Timeline) -> None:
    page = timeline.page
    host = page.evaluate(TO_SUBGRAPH, [int(timeline.node)])
    page.evaluate(OPEN, int(host))
    page.evaluate(EXPOSE, int(host))
    show(page)
    inside = Timeline(page, page.evaluate("() => String(app.canvas.graph._nodes[0].id)")).widgets()
    assert inside["lcv_timeline"]["hidden"] and not inside["prompts"]["hidden"]
    page.evaluate("() => app.canvas.setGraph(app.rootGraph ?? app.graph)")
    show(page)
    outside = page.evaluate(
        "(id) => app.canvas.graph.getNodeById(id).widgets.map((one) => [one.name, one.value, Boolean(one.hidden)])",
        int(host),
    )
    assert ["prompts", "one\ntwo\nthree", False] in outside
    assert "lcv_timeline" not in [name for name, _, _ in outside]


BREAK = """() => {
  const { prototype } = LiteGraph.LGraphNode ?? Object.getPrototypeOf(LiteGraph.registered_node_types.KSampler);
  const whole = prototype.addDOMWidget;
  prototype.addDOMWidget = function (name, ...rest) {
    if (name === "lcv_timeline") throw new Error("broken by the test");
    return whole.call(this, name, ...rest);
  };
  window.mend = () => { prototype.addDOMWidget = whole; };
}"""


def test_where_it_cannot_be_made_the_text_stays(clean: Page) -> None:
    clean.evaluate(BREAK)
    try:
        node = Timeline(clean, add_node(clean, prompts="one\ntwo"))
        clean.wait_for_timeout(300)
        assert clean.locator(".lcv-timeline").count() == 0
        assert not node.widgets()["prompts"]["hidden"]
        assert graph_to_prompt(clean)[node.node]["inputs"]["prompts"] == "one\ntwo"
    finally:
        clean.evaluate("() => window.mend()")


def test_where_it_fails_later_the_text_comes_back(timeline: Timeline) -> None:
    page = timeline.page
    page.evaluate("() => { window.whole = Array.prototype.toSpliced; delete Array.prototype.toSpliced; }")
    try:
        timeline.put_caret(0, 3)
        timeline.press("Enter")
        expect(timeline.root).to_be_hidden()
        assert not timeline.widgets()["prompts"]["hidden"]
        assert timeline.value == "one\ntwo\nthree"
        saved = only_node(page)["widgets_values"]
        assert saved[0] == "one\ntwo\nthree" and None not in saved
    finally:
        page.evaluate("() => { Array.prototype.toSpliced = window.whole; }")
