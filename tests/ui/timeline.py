"""The segment timeline of a Long node, driven as a user does: mouse, keyboard, clipboard."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import Locator, Page, TimeoutError, expect

NODE = "LongCatVideoLong"
THREE = ("one", "two", "three")  # prompts
# A job of a second or two.
SMALL = {"width": 48, "height": 32, "num_frames": 9, "num_cond_frames": 5, "num_steps": 4, "schedule": "distilled"}
# A new graph that has one node of its kind already, so that this one is not above it.
ADD = """([type, values, at, width]) => {
  const node = LiteGraph.createNode(type);
  node.pos = at;
  app.canvas.graph.add(node);
  for (const [name, value] of Object.entries(values)) node.widgets.find((one) => one.name === name).value = value;
  node.setSize([width, node.computeSize()[1]]);
  return String(node.id);
}"""
SHOW = """async (scale) => {
  const { ds } = app.canvas;
  ds.scale = scale;
  ds.offset[0] = 150 / scale;
  ds.offset[1] = 100 / scale;
  app.canvas.setDirty(true, true);
  await graphTools.settled();
}"""
# In whichever graph it is, the one that is shown or another.
NODE_JS = """(id) => [app.canvas.graph, ...(app.rootGraph ?? app.graph).subgraphs?.values() ?? []]
  .map((graph) => graph.getNodeById(id) ?? graph.getNodeById(Number(id))).find(Boolean)"""
VALUE = f"([id, name]) => ({NODE_JS})(id).widgets.find((one) => one.name === name).value"
SET = f"([id, name, value]) => {{ ({NODE_JS})(id).widgets.find((one) => one.name === name).value = value }}"
# Newer front ends call a linked widget hidden, too, and draw its name and socket.
WIDGETS = f"""(id) => ({NODE_JS})(id).widgets.map(({{ name, y, hidden, visibility }}) =>
  ({{ name, y, hidden: visibility?.suppression.byExtension ?? Boolean(hidden) }}))"""
# These nodes become one; returns its id. And: show what is in it.
TO_SUBGRAPH = """(ids) => {
  const { graph } = app.canvas;
  const { node } = graph.convertToSubgraph(new Set(ids.map((id) => graph.getNodeById(id))));
  return String(node.id);
}"""
OPEN = """(id) => {
  const node = app.canvas.graph.getNodeById(id);
  app.canvas.openSubgraph(node.subgraph, node);
}"""
CARET = """() => {
  const { activeElement: text } = document;
  const card = [...document.querySelectorAll(".lcv-timeline textarea")].indexOf(text);
  return card < 0 ? null : [card, text.selectionStart, text.selectionEnd];
}"""


def add_node(page: Page, *, kind: str = NODE, at: tuple[int, int] = (100, 100), wide: int = 500, **values: Any) -> str:
    """A new node of the graph that is shown, so many pixels wide; returns its id."""
    return page.evaluate(ADD, [kind, values, at, wide])


def show(page: Page, scale: float = 1) -> None:
    """What is at (0, 0) of the graph comes near the upper left corner."""
    page.evaluate(SHOW, scale)


class Timeline:
    """The timeline of one node.

    root: the element; several nodes have several, in the order of their making.
    """

    def __init__(self, page: Page, node: str, place: int = 0) -> None:
        self.page = page
        self.node = node
        self.root = page.locator(".lcv-timeline").nth(place)
        self.cards = self.root.get_by_role("listitem")
        self.texts = self.root.get_by_role("textbox")
        self.total = self.root.locator(".lcv-total")
        self.strip = self.root.locator(".lcv-strip > span")
        self.said = self.root.get_by_role("status")

    @property
    def value(self) -> str:
        """What is saved and queued."""
        return self.get("prompts")

    def get(self, name: str) -> Any:
        return self.page.evaluate(VALUE, [self.node, name])

    def set(self, **values: Any) -> None:
        """Change widgets as the front end does, behind the timeline's back."""
        for name, value in values.items():
            self.page.evaluate(SET, [self.node, name, value])

    def widgets(self) -> dict[str, dict[str, Any]]:
        """By name: y, hidden."""
        return {widget["name"]: widget for widget in self.page.evaluate(WIDGETS, self.node)}

    def shows(self, *prompts: str) -> None:
        """One card each."""
        expect(self.texts).to_have_count(len(prompts))
        for index, prompt in enumerate(prompts):
            expect(self.texts.nth(index)).to_have_value(prompt)

    def must_have(self, *prompts: str) -> None:
        """One card each, and the node's value says the same."""
        self.shows(*prompts)
        assert self.value == "\n".join(prompts)

    def put_caret(self, card: int, start: int, end: int | None = None) -> None:
        self.texts.nth(card).click()
        select = "(text, [start, end]) => text.setSelectionRange(start, end)"
        self.texts.nth(card).evaluate(select, [start, start if end is None else end])

    def caret_is(self, card: int, start: int, end: int | None = None) -> None:
        """The focus is in that card's text, with that selection."""
        wanted = [card, start, start if end is None else end]
        try:
            self.page.wait_for_function(f"(wanted) => String(({CARET})()) === wanted", arg=",".join(map(str, wanted)))
        except TimeoutError:
            assert self.page.evaluate(CARET) == wanted

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def type(self, text: str) -> None:
        self.page.keyboard.type(text)

    def paste(self, text: str) -> None:
        self.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page.evaluate("(text) => navigator.clipboard.writeText(text)", text)
        self.press("Control+v")

    def button(self, name: str, card: int | None = None) -> Locator:
        place = self.root if card is None else self.cards.nth(card)
        return place.get_by_role("button", name=name)

    def spans(self) -> list[str]:
        """The seconds on each card."""
        return self.root.locator(".lcv-when span").all_inner_texts()

    def numbers(self) -> list[str]:
        return self.root.locator(".lcv-when b").all_inner_texts()

    def hold(self, card: int) -> tuple[float, float]:
        """Press the mouse on a card's grip; returns where."""
        x, y = centre(self.root.locator(".lcv-grip").nth(card))
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        return x, y

    def drag(self, card: int, over: int) -> None:
        """Move a card with the mouse until it lies over another one, and drop it there."""
        x, y = self.hold(card)
        _, target = centre(self.cards.nth(over))
        # Past the middle of the other one, in steps, as a hand moves.
        self.page.mouse.move(x, target + (4 if target > y else -4), steps=8)
        self.frames(2)
        self.page.mouse.up()

    def frames(self, count: int) -> None:
        """Wait until the page has been drawn so many times."""
        frame = "() => new Promise((done) => requestAnimationFrame(done))"
        for _ in range(count):
            self.page.evaluate(frame)


def centre(element: Locator) -> tuple[float, float]:
    box = element.bounding_box()
    assert box, "it is not on the page"
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
