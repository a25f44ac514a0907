// The segment timeline of the Long / Interactive Video node: its `prompts` as a list of cards.
//
// The value stays where it is, in the node's own text widget: one prompt per line. The timeline is a second widget
// that is saved nowhere; while it is shown, the text widget is hidden. Whatever a front end lacks leaves the text widget.

import { followJobs } from "./jobs.js";
import { isLinked, nativeCounts } from "./native.js";
import { Run } from "./progress.js";
import {
  History, formatPrompts, inserted, joined, moved, parsePrompts, pasted, plan, removed, split,
} from "./segments.js";
import { translator } from "./strings.js";
import { TimelineView } from "./view.js";

const NODE = "LongCatVideoLong";
// What is interrupted goes on when the same graph is queued again: the seed of a new node stays what it is.
const GO_ON = [NODE, "LongCatVideoRefine"];
const PROPERTY = "Prompts view";
const MARGIN = 10;
const WATCH_MS = 200;
// From this version on, nodes drawn by Vue show the elements that extensions add, and hide and show them when told to.
const VUE_NODES_SHOW_ELEMENTS = [1, 37];

/** @type {WeakMap<object, Timeline>} by node */
const timelines = new WeakMap();
/** @type {WeakSet<object>} widgets */
const hiddenHere = new WeakSet();
// Timelines whose node is gone from the graph, until their elements are gone from the page.
const orphans = new Set();

/** Says why there is no timeline. It is an addition: nothing to alarm the user about. */
const stayWithText = (reason) => console.info(`LongCat-Video: prompts stay a plain text field (${reason})`);

function vueNodesAreTooOld() {
  const [major, minor] = String(window.__COMFYUI_FRONTEND_VERSION__ ?? "0.0").split(".").map(Number);
  const [needMajor, needMinor] = VUE_NODES_SHOW_ELEMENTS;
  return Boolean(window.LiteGraph?.vueNodesMode) && (major < needMajor || (major === needMajor && minor < needMinor));
}

/** Height on the canvas; null: what the widget's element asks for, and a share of the free room. */
function setFixedHeight(widget, height) {
  if (height === null) {
    delete widget.computeSize;
    delete widget.computeLayoutSize;
    return;
  }
  // LiteGraph adds 4.
  widget.computeSize = () => [0, height - 4];
  widget.computeLayoutSize = undefined;
}

/**
 * Hides a widget from both kinds of front end.
 * @returns {boolean} whether that is a change; not read from the widget: newer front ends say that a linked one is hidden
 */
function setHidden(widget, hidden) {
  if (hiddenHere.has(widget) === hidden) return false;
  hidden ? hiddenHere.add(widget) : hiddenHere.delete(widget);
  widget.hidden = hidden;
  // Older front ends keep the room of a hidden widget.
  setFixedHeight(widget, hidden ? 0 : null);
  // Not enumerable: a subgraph copies the options of the inputs it shows, and must not copy this.
  Object.defineProperty(widget.options, "hidden", { value: hidden, enumerable: false, configurable: true, writable: true });
  return true;
}

class Timeline {
  constructor(app, node) {
    this.app = app;
    this.node = node;
    this.text = node.widgets?.find((widget) => widget.name === "prompts");
    if (!this.text?.options || typeof node.addDOMWidget !== "function") throw new Error("the front end is too old");
    if (vueNodesAreTooOld()) throw new Error("this version's Vue nodes do not show custom elements");
    this.prompts = parsePrompts(this.value);
    this.history = new History(this.prompts);
    this.view = new TimelineView(this.#actions(), translator(app.extensionManager?.setting?.get("Comfy.Locale")));
    this.widget = this.#addWidget();
    this.#forwardToCanvas();
    this.#follow();
    timelines.set(node, this);
    this.guarded(() => this.sync());
  }

  get value() {
    return String(this.text.value ?? "");
  }

  get asText() {
    return this.node.properties?.[PROPERTY] === "text";
  }

  #addWidget() {
    const { node, text, view } = this;
    const widget = node.addDOMWidget("lcv_timeline", "lcv_timeline", view.root, {
      serialize: false,
      getMinHeight: () => view.height + 2 * MARGIN,
      getMaxHeight: () => view.fullHeight + 2 * MARGIN,
      // The socket of the hidden text widget belongs beside the cards.
      onDraw: () => hiddenHere.has(text) && (text.y = widget.y),
    });
    widget.serialize = false;
    // Drawn where the prompts are.
    node.widgets.splice(node.widgets.indexOf(widget), 1);
    node.widgets.splice(node.widgets.indexOf(text) + 1, 0, widget);
    this.#closeGap(widget);
    return widget;
  }

  /** Front ends of 2025 save values by the widget's place and leave a hole for the one that is not saved. */
  #closeGap(widget) {
    const { node } = this;
    const { onSerialize } = node;
    node.onSerialize = (saved) => {
      onSerialize?.call(node, saved);
      const values = saved.widgets_values;
      if (values?.length === node.widgets.length) values.splice(node.widgets.indexOf(widget), 1);
    };
  }

  /** Values and links change without an event that all front ends have, so the node is looked at now and then. */
  #follow() {
    const { node } = this;
    const { onAdded, onRemoved } = node;
    const look = () => this.guarded(() => this.sync());
    node.onAdded = (...args) => {
      onAdded?.apply(node, args);
      orphans.delete(this);
      this.timer ??= setInterval(look, WATCH_MS);
      look();
    };
    node.onRemoved = (...args) => {
      this.#stop();
      orphans.add(this);
      onRemoved?.apply(node, args);
    };
  }

  #stop() {
    clearInterval(this.timer);
    this.timer = undefined;
  }

  /**
   * Undo and reload make new nodes with the old ids. A node drawn by Vue is not built anew for that, and goes on showing
   * the element of the old one.
   */
  #takeOver() {
    for (const orphan of orphans) {
      const { root } = orphan.view;
      if (root.isConnected && orphan.node.id === this.node.id && !this.view.root.isConnected) root.replaceWith(this.view.root);
      if (!root.isConnected) orphans.delete(orphan);
    }
  }

  /** A timeline that fails gives way to the text widget. */
  guarded(act) {
    if (this.failed) return;
    try {
      act();
    } catch (error) {
      this.failed = true;
      this.detach();
      stayWithText(error.message);
    }
  }

  detach() {
    this.#stop();
    this.#show();
    this.view.destroy();
  }

  /** Shows what the node says now. */
  sync() {
    this.#show();
    const external = this.value !== this.shownText;
    if (external) {
      this.shownText = this.value;
      this.prompts = parsePrompts(this.value);
      this.history = new History(this.prompts);
    }
    this.#render(external);
    this.#redrawGrown();
    this.#takeOver();
  }

  /** @returns {"cards"|"text"|"linked"|"off"} what of the timeline is there; linked: the finished segments alone */
  get mode() {
    if (this.failed) return "off";
    if (isLinked(this.node, "prompts")) return this.run?.finished ? "linked" : "off";
    return this.asText ? "text" : "cards";
  }

  #show() {
    const { node, text, widget, mode } = this;
    const changed = [setHidden(text, mode === "cards"), setHidden(widget, mode === "off"), mode !== this.shownMode];
    this.shownMode = mode;
    if (!changed.includes(true)) return;
    this.#fit();
    // Vue nodes look at their widgets again when the list of them changes.
    const place = node.widgets.indexOf(widget);
    if (place >= 0) node.widgets.splice(place, 1), node.widgets.splice(place, 0, widget);
    this.#redraw();
  }

  /** Cards share the free room of the node; what is there without them takes what it needs. */
  #fit() {
    const fixed = this.mode === "text" || this.mode === "linked";
    if (this.mode !== "off") setFixedHeight(this.widget, fixed ? this.view.height + 2 * MARGIN : null);
  }

  #render(force) {
    const prompts = this.mode === "linked" ? [] : this.prompts;
    const planned = plan(prompts, this.#settings());
    const state = JSON.stringify([planned, this.mode]);
    if (this.mode === "off" || (!force && state === this.shownState)) return;
    this.shownState = state;
    this.view.render(prompts, planned, this.mode);
    this.#mark();
  }

  #settings() {
    const native = nativeCounts(this.node);
    const count = (name, ofModel) => {
      const number = this.#number(name);
      return number === 0 ? ofModel : number;
    };
    return {
      numFrames: count("num_frames", native.numFrames),
      numCondFrames: count("num_cond_frames", native.numCondFrames),
      frameRate: this.#number("frame_rate"),
      numSegments: this.#number("num_segments"),
      fromVideo: isLinked(this.node, "video"),
    };
  }

  /** @returns {number|null} null where a link decides */
  #number(name) {
    const widget = this.node.widgets.find((each) => each.name === name);
    return widget && !isLinked(this.node, name) ? Number(widget.value) : null;
  }

  started() {
    this.run = new Run(this.value);
    this.guarded(() => this.#mark());
  }

  stepped(value, max) {
    this.#job().step(value, max);
    this.guarded(() => this.#mark());
  }

  /** @returns {boolean} whether the segment's video is shown here */
  finished(index, video) {
    this.#job().finish(index, video);
    this.guarded(() => {
      this.sync();
      this.#mark();
      this.view.play(index);
      this.view.say("finished", { n: index + 1 });
    });
    return !this.failed;
  }

  ended() {
    this.run?.end();
    this.guarded(() => this.#mark());
  }

  /** A page that is loaded while a job runs has missed its start. */
  #job() {
    this.run ??= new Run(this.value);
    return this.run;
  }

  /** Marks are for the prompts that the job was started with. */
  #mark() {
    const { run } = this;
    if (this.mode === "off") return;
    this.view.mark(run?.text === this.value ? run : null, run?.videos ?? []);
  }

  /** A node that grows while it is drawn is not drawn again by the front end. */
  #redrawGrown() {
    const [, height] = this.node.size;
    if (height !== this.drawnHeight) this.#redraw();
    this.drawnHeight = height;
  }

  #redraw() {
    this.node.setDirtyCanvas?.(true, true);
  }

  /** @param {object} how typed, time: see History.push; caret: null for the end; focus: false keeps the focus */
  #change(prompts, index, { typed = false, caret = null, said = null } = {}) {
    if (!typed) this.#checkpoint();
    this.history.push(prompts, index, { typed, time: performance.now() });
    this.#write(prompts);
    if (typed) return;
    this.view.focus(index, caret);
    if (said) this.view.say(...said);
    this.#checkpoint();
  }

  #write(prompts) {
    this.prompts = prompts;
    this.shownText = formatPrompts(prompts);
    this.text.value = this.shownText;
    this.#render(true);
    this.#redraw();
  }

  #travel(state, said) {
    if (!state) return;
    this.#write(state.prompts);
    this.view.focus(state.index);
    this.view.say(said);
    this.#checkpoint();
  }

  /** The front end's own undo takes a picture of the graph when a change ends. */
  #checkpoint() {
    const { canvas } = this.app;
    canvas?.emitBeforeChange?.();
    canvas?.emitAfterChange?.();
  }

  #toggle() {
    this.#checkpoint();
    if (this.asText) delete this.node.properties[PROPERTY];
    else this.node.properties[PROPERTY] = "text";
    this.sync();
    this.#checkpoint();
  }

  /** @returns {import("./view.js").Actions} */
  #actions() {
    const change = (...args) => this.#change(...args);
    const actions = {
      type: (index, text) => change(this.prompts.with(index, text), index, { typed: true }),
      add: (index) => change(inserted(this.prompts, index + 1), index + 1, { said: ["added", { n: index + 2 }] }),
      duplicate: (index) =>
        change(inserted(this.prompts, index + 1, this.prompts[index]), index + 1, { said: ["added", { n: index + 2 }] }),
      remove: (index) => {
        const prompts = removed(this.prompts, index);
        change(prompts, Math.min(index, prompts.length - 1), { said: ["removed", { n: index + 1 }] });
      },
      move: (from, to) =>
        change(moved(this.prompts, from, to), to, { said: ["moved", { n: to + 1, count: this.prompts.length }] }),
      split: (index, start, end) => change(split(this.prompts, index, start, end), index + 1, { caret: 0 }),
      join: (index) => {
        const { prompts, caret } = joined(this.prompts, index);
        change(prompts, index - 1, { caret });
      },
      paste: (card, start, end, text) => {
        const { prompts, index, caret } = pasted(this.prompts, card, start, end, text);
        change(prompts, index, { caret });
      },
      undo: () => this.#travel(this.history.undo(), "undone"),
      redo: () => this.#travel(this.history.redo(), "redone"),
      checkpoint: () => this.#checkpoint(),
      toggle: () => this.#toggle(),
      resized: () => {
        this.#fit();
        this.#redraw();
      },
    };
    const guard = ([name, act]) => [name, (...args) => this.guarded(() => act(...args))];
    return Object.fromEntries(Object.entries(actions).map(guard));
  }

  /** Over a node drawn on the canvas, the wheel zooms and the middle button pans, unless the cards can scroll. */
  #forwardToCanvas() {
    const { canvas } = this.app;
    const { root, scroller } = this.view;
    const overCanvas = () => !window.LiteGraph?.vueNodesMode && typeof canvas?.processMouseWheel === "function";
    root.addEventListener("wheel", (event) => {
      if (!overCanvas()) return;
      const scrolls = scroller.scrollHeight > scroller.clientHeight && scroller.contains(event.target);
      event.stopPropagation();
      if (scrolls && !event.ctrlKey && Math.abs(event.deltaY) >= Math.abs(event.deltaX)) return;
      event.preventDefault();
      canvas.processMouseWheel(event);
    });
    const middle = { pointerdown: "processMouseDown", pointermove: "processMouseMove", pointerup: "processMouseUp" };
    for (const [type, handler] of Object.entries(middle)) {
      root.addEventListener(type, (event) => {
        const isMiddle = type === "pointermove" ? event.buttons & 4 : event.button === 1;
        if (isMiddle && overCanvas()) canvas[handler]?.(event);
      });
    }
  }
}

function keepSeed(node) {
  const control = node.widgets?.find((widget) => widget.name === "control_after_generate");
  if (control) control.value = "fixed";
}

function addStyles() {
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = new URL("./timeline.css", import.meta.url).href;
  document.head.append(link);
}

async function start() {
  const { app } = await import("../../../scripts/app.js");
  if (typeof app?.registerExtension !== "function") throw new Error("the front end takes no extensions");
  addStyles();
  const { api } = await import("../../../scripts/api.js").catch(() => ({}));
  if (typeof api?.apiURL === "function") followJobs(api, () => app.rootGraph ?? app.graph, timelines);
  app.registerExtension({
    name: "LongCatVideo.SegmentTimeline",
    nodeCreated(node) {
      if (GO_ON.includes(node.comfyClass)) keepSeed(node);
      if (node.comfyClass !== NODE) return;
      try {
        new Timeline(app, node);
      } catch (error) {
        stayWithText(error.message);
      }
    },
  });
}

await start().catch((error) => stayWithText(error.message));
