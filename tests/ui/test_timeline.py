"""The segment timeline: cards and text are the same, by mouse and by keyboard."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import expect

from .timeline import THREE, Timeline, add_node, centre, show


def test_the_text_field_gives_way_to_cards(timeline: Timeline) -> None:
    widgets = timeline.widgets()
    assert widgets["prompts"]["hidden"] and not widgets["lcv_timeline"]["hidden"]
    expect(timeline.root).to_be_visible()
    # Where the prompts were: above all other inputs.
    assert widgets["lcv_timeline"]["y"] < widgets["negative_prompt"]["y"] < widgets["num_segments"]["y"]


LINES = {
    "": [""],
    "one": ["one"],
    "one\ntwo": ["one", "two"],
    "one\r\ntwo\rthree": ["one", "two", "three"],
    "one\n\n two ": ["one", "", " two "],
    "one\n\n\n": ["one"],
    "one\u2028two\x85three\x1cfour": ["one", "two", "three", "four"],
    "一只猫\n🎬 läuft": ["一只猫", "🎬 läuft"],
}


def test_a_card_per_line(timeline: Timeline) -> None:
    for text, cards in LINES.items():
        timeline.set(prompts=text)
        timeline.shows(*cards)
        # Looking changes nothing. The field of older front ends makes one kind of line break of three.
        assert timeline.value in (text, text.replace("\r\n", "\n").replace("\r", "\n"))


def test_typing_changes_the_text(timeline: Timeline) -> None:
    timeline.put_caret(1, 3)
    timeline.type(" and a half")
    timeline.must_have("one", "two and a half", "three")
    timeline.press("Home")
    timeline.type("almost ")
    timeline.must_have("one", "almost two and a half", "three")


def test_a_change_from_outside_changes_the_cards(timeline: Timeline) -> None:
    timeline.put_caret(0, 0)
    timeline.set(prompts="a\nb")
    timeline.must_have("a", "b")
    timeline.texts.nth(1).click()
    timeline.type("c")
    timeline.must_have("a", "bc")


def test_add(timeline: Timeline) -> None:
    timeline.button("Add segment").click()
    timeline.caret_is(3, 0)
    timeline.type("four")
    timeline.must_have(*THREE, "four")
    timeline.put_caret(0, 2)
    timeline.press("Shift+Enter")
    timeline.caret_is(1, 0)
    timeline.must_have("one", "", "two", "three", "four")


def test_enter_splits(timeline: Timeline) -> None:
    timeline.put_caret(2, 2)
    timeline.press("Enter")
    timeline.must_have("one", "two", "th", "ree")
    timeline.caret_is(3, 0)
    timeline.put_caret(0, 1, 2)  # what is selected goes, as in any text
    timeline.press("Enter")
    timeline.must_have("o", "e", "two", "th", "ree")
    timeline.press("End", "Enter")
    timeline.type("new")
    timeline.must_have("o", "e", "new", "two", "th", "ree")


def test_backspace_joins(timeline: Timeline) -> None:
    timeline.put_caret(0, 0)
    timeline.press("Backspace")  # nothing before it
    timeline.must_have(*THREE)
    timeline.put_caret(1, 0)
    timeline.press("Backspace")
    timeline.must_have("onetwo", "three")
    timeline.type("|")
    timeline.must_have("one|two", "three")
    timeline.press("Backspace")  # within the text: a letter
    timeline.must_have("onetwo", "three")
    timeline.put_caret(1, 0, 2)
    timeline.press("Backspace")  # a selection at the start: only that
    timeline.must_have("onetwo", "ree")


def test_delete(timeline: Timeline) -> None:
    timeline.cards.nth(1).hover()
    timeline.button("Delete", card=1).click()
    timeline.must_have("one", "three")
    timeline.caret_is(1, 5)
    timeline.put_caret(0, 0)
    timeline.press("Delete", "Delete", "Delete")
    timeline.must_have("", "three")
    timeline.press("Delete")
    timeline.must_have("three")
    timeline.button("Delete", card=0).click()  # the last card stays
    timeline.must_have("")
    timeline.caret_is(0, 0)


def test_duplicate(timeline: Timeline) -> None:
    timeline.put_caret(0, 1)
    timeline.press("Control+d")
    timeline.must_have("one", "one", "two", "three")
    timeline.type("!")
    timeline.must_have("one", "one!", "two", "three")
    timeline.cards.nth(3).hover()
    timeline.button("Duplicate", card=3).click()
    timeline.must_have("one", "one!", "two", "three", "three")


def test_move_with_keys(timeline: Timeline) -> None:
    timeline.put_caret(0, 1)
    timeline.press("Alt+ArrowDown")
    timeline.must_have("two", "one", "three")
    timeline.press("Alt+ArrowDown", "Alt+ArrowDown", "Alt+ArrowDown")
    timeline.must_have("two", "three", "one")
    timeline.type("!")
    timeline.must_have("two", "three", "one!")
    timeline.press("Alt+ArrowUp", "Alt+ArrowUp", "Alt+ArrowUp")
    timeline.must_have("one!", "two", "three")


@pytest.mark.parametrize("scale", [1, 0.6])
def test_move_with_the_mouse(timeline: Timeline, scale: float) -> None:
    show(timeline.page, scale)
    timeline.drag(0, over=2)
    timeline.must_have("two", "three", "one")
    timeline.drag(2, over=1)
    timeline.must_have("two", "one", "three")
    timeline.drag(1, over=0)
    timeline.must_have("one", "two", "three")


def test_a_drag_that_leads_nowhere_or_is_cancelled(timeline: Timeline) -> None:
    page = timeline.page
    x, y = timeline.hold(0)
    page.mouse.move(x, y + 8, steps=3)
    page.mouse.up()
    timeline.must_have(*THREE)
    x, y = timeline.hold(0)
    page.mouse.move(x, centre(timeline.cards.nth(2))[1] + 4, steps=6)
    expect(timeline.cards.nth(0)).to_have_class(re.compile("lcv-held"))
    page.keyboard.press("Escape")
    expect(timeline.cards.nth(0)).not_to_have_class(re.compile("lcv-held"))
    page.mouse.up()
    timeline.must_have(*THREE)
    assert page.evaluate("() => [...app.canvas.graph._nodes[0].pos]") == [100, 100]  # nor was the node dragged


def test_a_drag_scrolls_a_long_list(timeline: Timeline) -> None:
    prompts = [f"shot {number}" for number in range(12)]
    timeline.set(prompts="\n".join(prompts))
    timeline.must_have(*prompts)
    scroller = timeline.root.locator(".lcv-scroller")
    box = scroller.bounding_box()
    assert box
    x, _ = timeline.hold(0)
    timeline.page.mouse.move(x, box["y"] + box["height"] - 5, steps=6)
    bottom = "(one) => one.scrollTop + one.clientHeight >= one.scrollHeight - 1"
    timeline.page.wait_for_function(bottom, arg=scroller.element_handle())
    timeline.frames(2)
    timeline.page.mouse.up()
    timeline.must_have(*prompts[1:], prompts[0])


def test_pasted_lines_are_cards(timeline: Timeline) -> None:
    timeline.put_caret(1, 1, 2)
    timeline.paste("A\nB\n\nC\n")
    timeline.must_have("one", "tA", "B", "Co", "three")
    timeline.caret_is(3, 1)
    timeline.paste("x")  # one line is one line
    timeline.must_have("one", "tA", "B", "Cxo", "three")
    timeline.put_caret(0, 0)
    timeline.paste("\r\n")
    timeline.must_have(" one", "tA", "B", "Cxo", "three")


def test_undo_and_redo(timeline: Timeline) -> None:
    seed = timeline.get("seed")
    timeline.put_caret(0, 3)
    timeline.type(" more")  # without a pause it is one step
    timeline.press("Enter")
    timeline.type("x")
    timeline.press("Control+d")
    done = [THREE, ("one more", "two", "three"), ("one more", "", "two", "three"), ("one more", "x", "two", "three")]
    timeline.must_have("one more", "x", "x", "two", "three")
    for state in reversed(done):
        timeline.press("Control+z")
        timeline.must_have(*state)
    timeline.press("Control+z")  # the beginning
    timeline.must_have(*THREE)
    for state in done[1:]:
        timeline.press("Control+y")
        timeline.must_have(*state)
    timeline.press("Control+Shift+z")
    timeline.must_have("one more", "x", "x", "two", "three")
    timeline.press("Control+z")
    timeline.type("new")  # from here on nothing is to be redone
    timeline.press("Control+y")
    assert "new" in timeline.value
    assert timeline.get("seed") == seed and timeline.widgets()["seed"]


def test_arrows_lead_from_card_to_card(timeline: Timeline) -> None:
    timeline.put_caret(0, 3)
    timeline.press("ArrowDown")
    timeline.caret_is(1, 0)
    timeline.press("ArrowLeft")
    timeline.caret_is(0, 3)
    timeline.press("ArrowRight")
    timeline.caret_is(1, 0)
    timeline.press("ArrowUp")
    timeline.caret_is(0, 3)
    timeline.press("ArrowLeft")  # within the text it is an arrow
    timeline.caret_is(0, 2)
    timeline.press("Home", "ArrowUp")  # nothing above
    timeline.caret_is(0, 0)
    timeline.press("Shift+ArrowDown", "Shift+ArrowDown")  # selects
    timeline.caret_is(0, 0, 3)
    timeline.must_have(*THREE)


def test_tab_goes_through_it_in_order(timeline: Timeline) -> None:
    names = """() => [...document.querySelectorAll(".lcv-timeline :focus")].map((one) => one.ariaLabel)[0] ?? null"""

    def focused() -> str | None:
        return timeline.page.evaluate(names)

    timeline.put_caret(1, 0)
    way = ["Duplicate (Ctrl+D)", "Delete", "Prompt of card 3", "Duplicate (Ctrl+D)", "Delete", "Add segment"]
    for name in way:
        timeline.press("Tab")
        assert focused() == name
    for name in ["Prompt of card 2", *way[:-1]][::-1]:
        timeline.press("Shift+Tab")
        assert focused() == name
    timeline.press(*["Shift+Tab"] * 4)
    assert focused() == "Edit as text, or connect a link"


def test_a_story_by_keyboard_alone(timeline: Timeline) -> None:
    timeline.set(prompts="")
    timeline.must_have("")
    timeline.texts.nth(0).focus()
    timeline.type("a door opens")
    timeline.press("Enter")
    timeline.type("rain")
    timeline.press("Control+d", "End")
    timeline.type(" stops")
    timeline.press("Alt+ArrowUp", "Tab", "Tab", "Enter")  # delete it by its button
    timeline.must_have("a door opens", "rain")
    timeline.press("Tab", "Tab", "Tab", "Enter")  # the last one's buttons, then add
    timeline.type("night")
    timeline.must_have("a door opens", "rain", "night")
    timeline.press("Control+z", "Control+z")
    timeline.must_have("a door opens", "rain")


def test_the_focus_is_seen(timeline: Timeline) -> None:
    style = "(one, name) => getComputedStyle(one)[name]"
    card, button = timeline.cards.nth(0), timeline.button("Duplicate", card=0)
    actions = timeline.root.locator(".lcv-actions").nth(0)
    timeline.page.mouse.move(1500, 900)
    before = card.evaluate(style, "borderTopColor")
    assert actions.evaluate(style, "opacity") == "0"
    timeline.texts.nth(0).focus()
    assert card.evaluate(style, "borderTopColor") != before
    assert actions.evaluate(style, "opacity") == "1"
    assert button.evaluate(style, "outlineStyle") == "none"
    timeline.press("Tab")
    assert button.evaluate(style, "outlineStyle") == "solid"
    # The strip says which of them it is.
    expect(timeline.strip.nth(0)).to_have_class(re.compile("lcv-current"))
    timeline.texts.nth(2).focus()
    expect(timeline.strip.nth(2)).to_have_class(re.compile("lcv-current"))
    expect(timeline.strip.nth(0)).not_to_have_class(re.compile("lcv-current"))


def test_names_and_roles(timeline: Timeline) -> None:
    page = timeline.page
    group = page.get_by_role("group", name="Segments, one prompt each")
    expect(group.get_by_role("list").get_by_role("listitem")).to_have_count(3)
    expect(group.get_by_role("listitem", name="Segment 2 of 3, 6.2 – 11.5 s", exact=True)).to_have_count(1)
    for number in (1, 2, 3):
        expect(group.get_by_role("textbox", name=f"Prompt of card {number}", exact=True)).to_have_count(1)
    names = [button.get_attribute("aria-label") for button in group.get_by_role("button").all()]
    assert names == [
        "Edit as text, or connect a link", *["Duplicate (Ctrl+D)", "Delete"] * 3, "Add segment",
    ]  # fmt: skip
    timeline.set(prompts="one\n\nthree")
    expect(group.get_by_role("listitem", name="Empty card, no segment", exact=True)).to_have_count(1)
    assert timeline.numbers() == ["1", "–", "2"]


def test_what_happens_is_said(timeline: Timeline) -> None:
    timeline.put_caret(0, 0)
    timeline.press("Alt+ArrowDown")
    expect(timeline.said).to_have_text("Moved to place 2 of 3")
    timeline.press("Control+d")
    expect(timeline.said).to_have_text("Card 3 added")
    timeline.press("Control+z")
    expect(timeline.said).to_have_text("Undone")
    timeline.press("Control+y")
    expect(timeline.said).to_have_text("Redone")
    timeline.press("Tab", "Tab", "Enter")
    expect(timeline.said).to_have_text("Card 3 deleted")


def test_keys_of_a_card_do_not_reach_the_graph(timeline: Timeline) -> None:
    page = timeline.page
    page.evaluate("(id) => app.canvas.selectNode(app.canvas.graph.getNodeById(id))", int(timeline.node))
    timeline.put_caret(1, 3)
    timeline.press("Delete", "Control+z", "Tab", "Delete", "Backspace", "Control+d")
    timeline.must_have("one", "two", "two", "three")


def test_other_shortcuts_are_the_front_ends(timeline: Timeline) -> None:
    page = timeline.page
    page.route("**/prompt", lambda route: route.fulfill(json={}))
    timeline.put_caret(0, 3)
    timeline.type("!")
    with page.expect_response("**/prompt") as answer:
        timeline.press("Control+Enter")  # run
    page.unroute("**/prompt")
    (node,) = answer.value.request.post_data_json["prompt"].values()
    assert node["inputs"]["prompts"] == "one!\ntwo\nthree"
    timeline.must_have("one!", "two", "three")


def test_an_input_method_may_use_enter(timeline: Timeline) -> None:
    timeline.put_caret(0, 3)
    chosen = "{ key: 'Enter', isComposing: true, bubbles: true }"
    timeline.texts.nth(0).evaluate(f"(text) => text.dispatchEvent(new KeyboardEvent('keydown', {chosen}))")
    timeline.must_have(*THREE)


def test_the_wheel_scrolls_cards_or_zooms(timeline: Timeline) -> None:
    page = timeline.page
    page.mouse.move(*centre(timeline.cards.nth(1)))
    page.mouse.wheel(0, 200)
    page.wait_for_function("() => app.canvas.ds.scale < 1")
    show(page)
    prompts = [f"shot {number}" for number in range(12)]
    timeline.set(prompts="\n".join(prompts))
    timeline.must_have(*prompts)
    page.mouse.move(*centre(timeline.cards.nth(1)))
    page.mouse.wheel(0, 200)
    scrolled = "(one) => one.scrollTop > 100"
    page.wait_for_function(scrolled, arg=timeline.root.locator(".lcv-scroller").element_handle())
    assert page.evaluate("() => app.canvas.ds.scale") == 1


TIMES: list[tuple[dict[str, Any], list[str], str]] = [
    # The model's own: 93 frames, 13 of them shared.
    ({}, ["0.0 – 6.2 s", "6.2 – 11.5 s", "11.5 – 16.9 s"], "3 segments · 16.9 s"),
    (
        {"num_frames": 33, "num_cond_frames": 5, "frame_rate": 10.0},
        ["0.0 – 3.3 s", "3.3 – 6.1 s", "6.1 – 8.9 s"],
        "3 segments · 8.9 s",
    ),
    ({"num_frames": 33}, ["0.0 – 2.2 s", "2.2 – 3.5 s", "3.5 – 4.9 s"], "3 segments · 4.9 s"),
    # Nothing would be new in the second: no time, and the node says why when it is queued.
    ({"num_frames": 13}, ["", "", ""], "3 segments"),
    ({"prompts": "one\n\n "}, ["0.0 – 6.2 s", "", ""], "1 segment · 6.2 s"),
    ({"prompts": ""}, [""], "no prompt yet"),
    ({"prompts": "one", "num_segments": 10}, ["0.0 – 54.2 s"], "10 segments · 54.2 s"),
    ({"prompts": "\none\n", "num_segments": 2}, ["", "0.0 – 11.5 s"], "2 segments · 11.5 s"),
    ({"num_segments": 3}, ["0.0 – 6.2 s", "6.2 – 11.5 s", "11.5 – 16.9 s"], "3 segments · 16.9 s"),
    ({"num_segments": 5}, ["0.0 – 6.2 s", "6.2 – 11.5 s", "11.5 – 16.9 s"], "3 prompts, but num_segments is 5"),
]


def test_seconds(timeline: Timeline) -> None:
    start = {
        name: timeline.get(name) for name in ("prompts", "num_segments", "num_frames", "num_cond_frames", "frame_rate")
    }
    for values, spans, total in TIMES:
        timeline.set(**start | values)
        expect(timeline.total).to_have_text(total)
        assert timeline.spans() == spans
        expect(timeline.total).to_have_class(re.compile("lcv-warning" if "but" in total else "^lcv-total$"))


def test_one_prompt_for_many_segments(timeline: Timeline) -> None:
    timeline.set(prompts="one", num_segments=5)
    expect(timeline.strip).to_have_count(5)
    assert timeline.numbers() == ["× 5"]
    expect(timeline.cards.nth(0)).to_have_attribute("aria-label", "Segment 1–5 of 5, 0.0 – 27.5 s")
    widths = [block.bounding_box()["width"] for block in timeline.strip.all()]  # type: ignore[index]
    assert widths[0] / widths[1] == pytest.approx(93 / 80, rel=0.05)
    assert widths[1] == pytest.approx(widths[4], rel=0.05)


def test_a_click_on_the_strip_goes_to_the_card(timeline: Timeline) -> None:
    prompts = [f"shot {number}" for number in range(12)]
    timeline.set(prompts="\n".join(prompts))
    timeline.must_have(*prompts)
    timeline.strip.nth(10).click()
    timeline.caret_is(10, 7)
    frame, card = (one.bounding_box() for one in (timeline.root.locator(".lcv-scroller"), timeline.cards.nth(10)))
    assert frame and card
    assert frame["y"] <= card["y"] and card["y"] + card["height"] <= frame["y"] + frame["height"] + 1


LINK = """([from, output, to, input]) => {
  const { graph } = app.canvas;
  const target = graph.getNodeById(to);
  graph.getNodeById(from).connect(output, target, target.inputs.findIndex((one) => one.name === input));
}"""


def test_seconds_of_the_model_that_is_connected(timeline: Timeline) -> None:
    page = timeline.page
    loader = add_node(page, kind="LongCatVideoLoader", at=(-500, 100), checkpoint="miniature (built in)")
    lora = add_node(page, kind="ModelSamplingSD3", at=(-500, 500))
    page.evaluate(LINK, [int(loader), 0, int(lora), "model"])
    page.evaluate(LINK, [int(lora), 0, int(timeline.node), "model"])
    expect(timeline.total).to_have_text("3 segments · 2.2 s")  # the miniature's own: 17 frames
    page.evaluate("(id) => app.canvas.graph.remove(app.canvas.graph.getNodeById(id))", int(loader))
    expect(timeline.total).to_have_text("3 segments · 16.9 s")


def test_seconds_when_it_goes_on_from_a_video(timeline: Timeline) -> None:
    page = timeline.page
    page.evaluate(LINK, [int(add_node(page, kind="EmptyImage", at=(-500, 100))), 0, int(timeline.node), "video"])
    # The first segment adds as much as the others: 80 frames.
    expect(timeline.total).to_have_text("3 segments · 16.0 s")
    page.evaluate(LINK, [int(add_node(page, kind="PrimitiveInt", at=(-500, 500))), 0, int(timeline.node), "num_frames"])
    expect(timeline.total).to_have_text("3 segments")  # who knows
    assert timeline.spans() == ["", "", ""]


def test_a_narrow_node_cuts_nothing(timeline: Timeline) -> None:
    long = "a woman in a long red coat walks slowly along a wet street at night"
    timeline.set(prompts=f"{long}\n{long}")
    resize = "([id, width]) => { const n = app.canvas.graph.getNodeById(id); n.setSize([width, n.computeSize()[1]]); }"
    inside = """(root) => [...root.querySelectorAll("textarea, .lcv-when, button, .lcv-total")].every((one) =>
      one.scrollWidth <= one.clientWidth + 1 && one.scrollHeight <= one.clientHeight + 1)"""
    for width in (600, 320, 225):
        timeline.page.evaluate(resize, [int(timeline.node), width])
        timeline.page.wait_for_function(inside, arg=timeline.root.element_handle(), timeout=3000)
