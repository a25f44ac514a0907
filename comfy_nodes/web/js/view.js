// The timeline's elements. It shows what it is given and reports what the user does; it keeps no prompts of its own.

import { makeSortable } from "./drag.js";
import { oneLine } from "./segments.js";

// Pixels, as in timeline.css: one row of buttons, and the rows and gaps around the list of cards.
const ROW_HEIGHT = 24;
const GAP = 4;
const FRAME_HEIGHT = 2 * ROW_HEIGHT + 2 * GAP;
const MIN_HEIGHT = 100;
const MAX_GROWN_HEIGHT = 320;
// Above so many segments, the strip leaves no gaps between them.
const MAX_BLOCKS_WITH_GAPS = 60;
const ARROWS = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1 };
const ICONS = {
  grip: "M6 3.5h.01M10 3.5h.01M6 8h.01M10 8h.01M6 12.5h.01M10 12.5h.01",
  add: "M8 3v10M3 8h10",
  duplicate: "M6 6h7.5v7.5H6zM3.5 10H2.5V2.5H10v1",
  remove: "M3 4.5h10M6.5 4.5v-2h3v2M4.5 4.5l.5 9h6l.5-9",
  text: "M3 4h10M3 8h10M3 12h6",
  cards: "M2.5 3h11v4h-11zM2.5 9.5h11v4h-11z",
};

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  svg.append(document.createElementNS(svg.namespaceURI, "path"));
  svg.firstChild.setAttribute("d", ICONS[name]);
  return svg;
}

function label(target, text) {
  target.title = text;
  target.setAttribute("aria-label", text);
}

function button(name, action) {
  const made = element("button", { type: "button", class: `lcv-button lcv-${name}` }, icon(name));
  made.addEventListener("click", (event) => action(event));
  return made;
}

/**
 * @typedef {object} Actions what the user can do; index: of a card
 * @property {(index: number, text: string) => void} type
 * @property {(index: number) => void} add  a card after this one
 * @property {(index: number) => void} duplicate
 * @property {(index: number, focus?: number) => void} remove
 * @property {(from: number, to: number) => void} move
 * @property {(index: number, start: number, end: number) => void} split
 * @property {(index: number) => void} join  with the card before
 * @property {(index: number, start: number, end: number, text: string) => void} paste
 * @property {() => void} undo
 * @property {() => void} redo
 * @property {() => void} checkpoint  typing has come to an end
 * @property {() => void} toggle  between cards and text
 * @property {() => void} resized  the height that the content asks for has changed
 */

function setDone(target, part) {
  target.style.setProperty("--lcv-done", part);
  target.classList.toggle("lcv-done", part === 1);
}

export class TimelineView {
  /** @param {Actions} actions  @param {(key: string, values?: object) => string} words */
  constructor(actions, words) {
    this.actions = actions;
    this.words = words;
    /** What it needs, and what it can use to show all cards; pixels. */
    this.height = MIN_HEIGHT;
    this.fullHeight = MIN_HEIGHT;
    this.strip = element("div", { class: "lcv-strip", "aria-hidden": "true" });
    this.toggle = button("text", actions.toggle);
    this.list = element("ol", { class: "lcv-list", role: "list" });
    this.scroller = element("div", { class: "lcv-scroller" }, this.list);
    this.addButton = button("add", () => actions.add(this.list.children.length - 1));
    this.addButton.append(element("span", {}, words("add")));
    this.addButton.setAttribute("aria-label", words("add"));
    this.total = element("span", { class: "lcv-total" });
    this.video = element("video", { controls: "", loop: "", playsinline: "", preload: "auto" });
    this.video.muted = true;
    this.caption = element("figcaption");
    this.player = element("figure", { class: "lcv-player", hidden: "" }, this.video, this.caption);
    this.live = element("div", { class: "lcv-live", role: "status", "aria-live": "polite" });
    this.root = element(
      "div",
      { class: "lcv-timeline", role: "group", "aria-label": words("timeline"), "data-capture-wheel": "true" },
      element("div", { class: "lcv-head" }, this.strip, this.toggle),
      this.scroller,
      element("div", { class: "lcv-foot" }, this.addButton, this.total),
      this.player,
      this.live,
    );
    // The front end blurs a widget's element when the user clicks elsewhere; what has the focus is inside of ours.
    this.root.blur = () => this.root.contains(document.activeElement) && document.activeElement.blur();
    this.videos = [];
    this.cancelDrag = makeSortable(this.list, this.scroller, actions.move);
    this.#listen();
    this.sizes = new ResizeObserver(() => this.#measure());
    this.sizes.observe(this.list);
    this.sizes.observe(this.player);
  }

  /**
   * @param {string[]} prompts
   * @param {ReturnType<import("./segments.js").plan>} plan
   * @param {"cards"|"text"|"linked"} mode cards; the node's own text field instead; or neither, the prompts come by link
   */
  render(prompts, plan, mode) {
    this.cancelDrag();
    this.plan = plan;
    this.mode = mode;
    this.root.classList.toggle("lcv-as-text", mode !== "cards");
    this.root.classList.toggle("lcv-linked", mode === "linked");
    this.toggle.replaceChildren(icon(mode === "cards" ? "text" : "cards"));
    label(this.toggle, this.words(mode === "cards" ? "asText" : "asCards"));
    while (this.list.children.length > prompts.length) this.list.lastChild.remove();
    while (this.list.children.length < prompts.length) this.list.append(this.#card());
    prompts.forEach((prompt, index) => this.#fill(index, prompt, plan));
    this.#showStrip(plan);
    this.#showTotal(plan);
    this.#measure();
  }

  /**
   * Marks what is done, and keeps the finished segments' videos.
   * @param {import("./progress.js").Run|null} run null: no marks
   * @param {string[]} videos addresses, by segment
   */
  mark(run, videos) {
    const { cards, segments, repeats } = this.plan;
    const done = (index, length) => (run ? run.done(index, length, segments.length) : 0);
    this.root.classList.toggle("lcv-marked", run !== null);
    cards.forEach(({ number }, index) => {
      const part = number === null ? 0 : done(number - 1, repeats);
      setDone(this.list.children[index], part);
      this.#name(index, part === 1);
    });
    [...this.strip.children].forEach((block, index) => setDone(block, done(index, 1)));
    this.videos = videos;
    this.player.hidden = !videos.some(Boolean);
    if (this.player.hidden && this.video.hasAttribute("src")) {
      this.video.removeAttribute("src");
      this.video.load();
    }
    this.#measure();
  }

  /** Shows the video of a segment, if it is finished. */
  play(segment) {
    const video = this.videos[segment];
    if (!video || this.video.getAttribute("src") === video) return;
    const count = this.plan.segments.length;
    const name = this.words(segment < count ? "segment" : "lone", { n: segment + 1, count });
    this.video.src = video;
    this.video.setAttribute("aria-label", name);
    this.caption.textContent = name;
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) this.video.play().catch(() => {});
  }

  /** Puts the caret into a card; null: at its end. */
  focus(index, caret = null) {
    const text = this.#text(index);
    if (!text) return;
    // Not the browser's scrolling: it would shift the whole canvas.
    text.focus({ preventScroll: true });
    const place = caret ?? text.value.length;
    text.setSelectionRange(place, place);
    const card = this.list.children[index];
    const below = card.offsetTop + card.offsetHeight - this.scroller.clientHeight;
    this.scroller.scrollTop = Math.min(card.offsetTop, Math.max(below, this.scroller.scrollTop));
  }

  say(key, values) {
    this.live.textContent = this.words(key, values);
  }

  destroy() {
    this.cancelDrag();
    this.sizes.disconnect();
  }

  #text(index) {
    return this.list.children[index]?.querySelector("textarea");
  }

  #card() {
    const text = element("textarea", { rows: 1, spellcheck: "true", placeholder: this.words("placeholder") });
    const act = (name) => (event) => this.actions[name](this.#indexOf(event.target));
    const grip = element("span", { class: "lcv-grip", title: this.words("grip"), "aria-hidden": "true" }, icon("grip"));
    return element(
      "li",
      { class: "lcv-card", role: "listitem" },
      grip,
      element("div", { class: "lcv-when" }, element("b"), element("span")),
      element("div", { class: "lcv-grow" }, text),
      element("div", { class: "lcv-actions" }, button("duplicate", act("duplicate")), button("remove", act("remove"))),
    );
  }

  #name(index, done) {
    const { cards, count, repeats } = this.plan;
    const { number, span } = cards[index];
    const numbers = repeats > 1 ? `1–${repeats}` : number;
    const name = number === null ? this.words("empty") : this.words("segment", { n: numbers, count: count ?? "?" });
    const parts = [name, span && this.words("span", span), done && this.words("isDone")];
    this.list.children[index].setAttribute("aria-label", parts.filter(Boolean).join(", "));
  }

  #fill(index, prompt, { cards, repeats }) {
    const card = this.list.children[index];
    const { number, span } = cards[index];
    const [duplicate, remove] = card.querySelectorAll("button");
    card.classList.toggle("lcv-empty", number === null);
    card.querySelector("b").textContent = number === null ? "–" : repeats > 1 ? `× ${repeats}` : number;
    card.querySelector(".lcv-when span").textContent = span ? this.words("span", span) : "";
    label(duplicate, this.words("duplicate"));
    label(remove, this.words("remove"));
    const text = this.#text(index);
    if (text.value !== prompt) text.value = prompt;
    text.parentElement.dataset.text = prompt;
    text.setAttribute("aria-label", this.words("prompt", { n: index + 1 }));
  }

  #showStrip({ segments }) {
    const blocks = segments.map(({ card, span }, index) => {
      const block = element("span", { title: span ? `${index + 1}: ${this.words("span", span)}` : String(index + 1) });
      block.style.flexGrow = span ? span.end - span.start : 1;
      block.addEventListener("click", () => {
        this.focus(card);
        this.play(index);
      });
      return block;
    });
    this.strip.replaceChildren(...blocks);
    this.strip.classList.toggle("lcv-dense", blocks.length > MAX_BLOCKS_WITH_GAPS);
    this.#markCurrent();
  }

  #markCurrent() {
    const current = [...this.list.children].findIndex((card) => card.contains(document.activeElement));
    const { segments } = this.plan;
    [...this.strip.children].forEach((block, index) =>
      block.classList.toggle("lcv-current", segments[index].card === current));
  }

  /** A card that gets the focus shows its video. */
  #enter(card) {
    this.#markCurrent();
    const { cards, repeats } = this.plan;
    const { number } = cards[card];
    const from = number - 1;
    const last = this.videos.slice(from, from + repeats).findLastIndex(Boolean);
    if (number !== null && last >= 0) this.play(from + last);
  }

  #showTotal({ cards, count, seconds, conflict }) {
    const { words } = this;
    const prompts = cards.filter((card) => card.number !== null).length;
    const segments = prompts ? this.#countOf(count) : words("none");
    const parts = conflict ? [words("conflict", { prompts, count: conflict })] : [segments];
    if (seconds && !conflict) parts.push(words("seconds", { value: seconds }));
    this.total.textContent = parts.join(" · ");
    this.total.classList.toggle("lcv-warning", Boolean(conflict));
  }

  #countOf(count) {
    if (count === null) return this.words("unknown");
    return count === 1 ? this.words("one") : this.words("many", { count });
  }

  /** The node grows with its cards up to a limit; from there on they scroll, or take the room that the user gives. */
  #measure() {
    if (!this.mode || (this.mode === "cards" && !this.list.offsetHeight)) return;
    const all = Math.max(MIN_HEIGHT, this.list.offsetHeight + FRAME_HEIGHT);
    const player = this.player.hidden ? 0 : this.player.offsetHeight;
    const rows = { cards: Math.min(all, MAX_GROWN_HEIGHT), text: ROW_HEIGHT, linked: 0 }[this.mode];
    const below = player + (rows && player ? GAP : 0);
    if (rows + below === this.height && all + below === this.fullHeight) return;
    this.height = rows + below;
    this.fullHeight = all + below;
    this.root.style.minHeight = `${this.height}px`;
    this.actions.resized();
  }

  #listen() {
    this.root.addEventListener("keydown", (event) => this.#keydown(event));
    this.list.addEventListener("input", ({ target }) => {
      const caret = target.selectionStart;
      if (target.value !== oneLine(target.value)) target.value = oneLine(target.value);
      target.setSelectionRange(caret, caret);
      this.actions.type(this.#indexOf(target), target.value);
    });
    this.list.addEventListener("focusin", ({ target }) => this.#enter(this.#indexOf(target)));
    this.video.addEventListener("loadedmetadata", () => {
      this.video.style.aspectRatio = `${this.video.videoWidth} / ${this.video.videoHeight}`;
    });
    this.list.addEventListener("focusout", () => requestAnimationFrame(() => this.#markCurrent()));
    this.list.addEventListener("change", () => this.actions.checkpoint());
    this.list.addEventListener("paste", (event) => {
      const text = event.clipboardData?.getData("text/plain") ?? "";
      event.stopPropagation();
      if (oneLine(text) === text) return;
      event.preventDefault();
      const { selectionStart, selectionEnd } = event.target;
      this.actions.paste(this.#indexOf(event.target), selectionStart, selectionEnd, text);
    });
  }

  /** Keys that the timeline uses end here, so that the front end's shortcuts do not see them. */
  #keydown(event) {
    if (event.isComposing) return;
    const isText = event.target instanceof HTMLTextAreaElement;
    const used = event.target.closest(".lcv-card") && this.#cardKey(event, isText ? event.target : null);
    if (used) event.preventDefault();
    const isShortcut = event.ctrlKey || event.metaKey || event.key === "Escape";
    if (used || (!isText && !isShortcut)) event.stopPropagation();
  }

  /** @returns {boolean} whether the key did something */
  #cardKey(event, text) {
    const index = this.#indexOf(event.target);
    const key = event.key.toLowerCase();
    if (event.altKey) return this.#moveKey(key, index);
    if (event.ctrlKey || event.metaKey) return this.#controlKey(event, key, index, text);
    if (text && !event.shiftKey) this.#arrowKey(index + ARROWS[event.key], ARROWS[event.key], text);
    return text !== null && this.#textKey(event, key, index, text);
  }

  /** An arrow that leaves the caret where it is was pressed at the edge of the text, and leads to the card beyond. */
  #arrowKey(to, direction, text) {
    const { selectionStart: start, selectionEnd: end } = text;
    if (start !== end || !this.list.children[to]) return;
    setTimeout(() => {
      const stayed = text.selectionStart === start && text.selectionEnd === start && document.activeElement === text;
      if (stayed) this.focus(to, direction > 0 ? 0 : null);
    });
  }

  #moveKey(key, index) {
    const to = index + ({ arrowup: -1, arrowdown: 1 }[key] ?? NaN);
    if (this.list.children[to]) this.actions.move(index, to);
    return !Number.isNaN(to);
  }

  /** Not Enter: with Ctrl it queues the graph, as everywhere. */
  #controlKey({ shiftKey }, key, index, text) {
    const { actions } = this;
    if (key === "d" && !shiftKey) actions.duplicate(index);
    else if (text && key === "z") shiftKey ? actions.redo() : actions.undo();
    else if (text && key === "y" && !shiftKey) actions.redo();
    else return false;
    return true;
  }

  #textKey({ shiftKey }, key, index, text) {
    const { actions } = this;
    const { value, selectionStart: start, selectionEnd: end } = text;
    const atStart = start === 0 && end === 0;
    if (key === "enter" && shiftKey) actions.add(index);
    else if (key === "enter") actions.split(index, start, end);
    else if (key === "delete" && !value) actions.remove(index);
    else if (key === "backspace" && atStart && index > 0) actions.join(index);
    else return false;
    return true;
  }

  #indexOf(target) {
    return [...this.list.children].indexOf(target.closest(".lcv-card"));
  }
}
