"""The segment timeline while the node runs: what is done, and each finished segment's video."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from comfyui.api import Client, wait_until
from playwright.sync_api import Page, expect

from .browser import alerts, console_errors
from .timeline import OPEN, SMALL, THREE, TO_SUBGRAPH, Timeline, add_node, show

LINK = """([from, output, to, input]) => {
  const { graph } = app.canvas;
  const target = graph.getNodeById(to);
  graph.getNodeById(from).connect(output, target, target.inputs.findIndex((one) => one.name === input));
}"""
QUEUE = "() => app.queuePrompt(0, 1)"
# How far each card is, looked at in every frame; equal looks are one.
WATCH = """() => {
  window.looks = [];
  const look = () => {
    if (!window.looks) return;
    const cards = [...document.querySelectorAll(".lcv-marked .lcv-card")];
    const now = cards.map((card) => Number(card.style.getPropertyValue("--lcv-done")));
    if (now.length && String(now) !== String(looks.at(-1))) looks.push(now);
    requestAnimationFrame(look);
  };
  look();
}"""
LOOKS = "() => { const { looks } = window; window.looks = null; return looks; }"


class Job:
    """A graph that makes a long video, small and fast."""

    def __init__(self, page: Page, comfy: Client, **values: Any) -> None:
        self.page = page
        self.comfy = comfy
        loader = add_node(page, kind="LongCatVideoLoader", at=(-500, 100), checkpoint="miniature (built in)")
        node = add_node(page, **SMALL | {"prompts": "\n".join(THREE)} | values)
        out = add_node(page, kind="PreviewImage", at=(700, 100), wide=300)
        for output, name in enumerate(("model", "clip", "vae")):
            page.evaluate(LINK, [int(loader), output, int(node), name])
        page.evaluate(LINK, [int(node), 0, int(out), "images"])
        self.timeline = Timeline(page, node)
        show(page)

    def queue(self) -> None:
        self.page.evaluate(QUEUE)
        wait_until(lambda: not self.comfy.idle(), "the job to be queued")

    def wait(self) -> None:
        wait_until(self.comfy.idle, "the end of the job", timeout=120)

    def done(self, card: int) -> float:
        return float(self.timeline.cards.nth(card).evaluate("(card) => card.style.getPropertyValue('--lcv-done')"))

    def caption(self) -> Any:
        return self.timeline.root.locator("figcaption")


@pytest.fixture
def clean(page: Page, comfy: Client) -> Iterator[Page]:
    """An empty graph; nothing may be wrong at the end, and nothing goes on."""
    yield page
    comfy.interrupt()
    wait_until(comfy.idle, "the end of the job")
    assert console_errors(page) == []
    assert alerts(page) == []


@pytest.fixture
def job(clean: Page, comfy: Client) -> Job:
    return Job(clean, comfy)


def test_cards_fill_up_and_show_what_is_finished(job: Job) -> None:
    timeline, page = job.timeline, job.page
    widgets = set(timeline.widgets())
    page.evaluate(WATCH)
    job.queue()
    expect(timeline.said).to_have_text("Segment 3 is finished", timeout=120_000)
    job.wait()
    looks = page.evaluate(LOOKS)
    # A busy browser draws its first frame after the first step.
    assert looks[0][0] < 1 and looks[0][1:] == [0, 0] and looks[-1] == [1, 1, 1]
    assert all(before <= after for one, two in pairwise(looks) for before, after in zip(one, two))
    assert [1, 0, 0] in looks or any(first == 1 > second for first, second, _ in looks)
    assert any(0 < part < 1 for look in looks for part in look)  # between segments, too
    for index in range(3):
        expect(timeline.cards.nth(index)).to_have_class(re.compile("lcv-done"))
        expect(timeline.strip.nth(index)).to_have_class(re.compile("lcv-done"))
    expect(timeline.cards.nth(2)).to_have_attribute("aria-label", re.compile("^Segment 3 of 3, .* s, finished$"))

    expect(job.caption()).to_have_text("Segment 3 of 3")
    video = timeline.root.locator("video")
    expect(video).to_be_visible()
    page.wait_for_function("(video) => video.videoWidth > 0", arg=video.element_handle())
    shape = video.evaluate("(video) => [video.videoWidth, video.videoHeight, video.loop, video.muted]")
    assert shape == [SMALL["width"], SMALL["height"], True, True]
    # The front end itself shows the live preview and no video: it would take the one for the other.
    assert set(timeline.widgets()) - widgets <= {"$$canvas-image-preview"}
    # A card that gets the focus shows its own.
    last = video.get_attribute("src")
    timeline.texts.nth(0).focus()
    expect(job.caption()).to_have_text("Segment 1 of 3")
    assert video.get_attribute("src") != last
    timeline.strip.nth(1).click()
    expect(job.caption()).to_have_text("Segment 2 of 3")

    # Marks are for the prompts that were queued.
    timeline.put_caret(0, 3)
    timeline.type("!")
    expect(timeline.root).not_to_have_class(re.compile("lcv-marked"))
    timeline.press("Control+z")
    expect(timeline.root).to_have_class(re.compile("lcv-marked"))


def test_after_an_interrupt_what_is_finished_stays(clean: Page, comfy: Client) -> None:
    # More segments than any machine makes before the interrupt gets through.
    count = 12
    job = Job(clean, comfy, prompts="\n".join(f"part {i}" for i in range(count)), num_steps=50, width=192, height=128)
    timeline = job.timeline
    job.queue()
    expect(timeline.cards.nth(0)).to_have_class(re.compile("lcv-done"), timeout=120_000)
    comfy.interrupt()
    job.wait()
    clean.wait_for_timeout(500)  # the last messages
    done = [job.done(card) for card in range(count)]
    finished = int(sum(done))
    assert 1 <= finished < count and done == [1] * finished + [0] * (count - finished)
    expect(job.caption()).to_have_text(f"Segment {finished} of {count}")

    # Queued again it goes on from there, and shows at once what it has.
    clean.evaluate(WATCH)
    job.queue()
    clean.wait_for_function("(at) => looks.some((look) => look[at] > 0)", arg=finished, timeout=60_000)
    looks = clean.evaluate(LOOKS)
    assert not any(0 < part < 1 for look in looks for part in look[:finished])


def test_linked_prompts_show_finished_segments(job: Job) -> None:
    timeline, page = job.timeline, job.page
    text = add_node(page, kind="PrimitiveStringMultiline", at=(-500, 400), value="by link\nand more")
    page.evaluate(LINK, [int(text), 0, int(timeline.node), "prompts"])
    expect(timeline.root).to_be_hidden()
    job.queue()
    expect(job.caption()).to_have_text("Segment 2", timeout=120_000)
    expect(timeline.root.locator("video")).to_be_visible()
    expect(timeline.cards.nth(0)).to_be_hidden()
    job.wait()


def test_one_prompt_for_all_fills_up_over_all_segments(clean: Page, comfy: Client) -> None:
    job = Job(clean, comfy, prompts="one", num_segments=2)
    clean.evaluate(WATCH)
    job.queue()
    expect(job.caption()).to_have_text("Segment 2 of 2", timeout=120_000)
    job.wait()
    looks = clean.evaluate(LOOKS)
    assert looks[-1] == [1] and [0.5] in looks
    # The card shows its last segment, the strip each.
    job.timeline.strip.nth(0).click()
    expect(job.caption()).to_have_text("Segment 1 of 2")


def test_a_node_in_a_subgraph_fills_up(job: Job) -> None:
    page = job.page
    host = page.evaluate(TO_SUBGRAPH, [int(job.timeline.node)])
    page.evaluate(OPEN, int(host))
    show(page)
    job.timeline.must_have(*THREE)
    job.queue()
    expect(job.caption()).to_have_text("Segment 3 of 3", timeout=120_000)
    job.wait()
    assert [job.done(card) for card in range(3)] == [1, 1, 1]
    page.evaluate("() => app.canvas.setGraph(app.rootGraph ?? app.graph)")
