// What the tests do and ask inside ComfyUI's page. Runs before its scripts; everything else is looked up when called.

window.graphTools = (() => {
  const TITLE = 30;
  const NOTICES = `.p-toast-message, .p-dialog, [role=alertdialog], [role=dialog], [data-testid=error-overlay],
    [data-testid=toast]`;
  const CLOSE = `.p-toast-close-button, .p-dialog-close-button, [role=dialog] [aria-label=Close],
    [data-testid=toast-close]`;
  const frame = () => new Promise((done) => requestAnimationFrame(done));
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  const graph = () => app.canvas.graph;
  const shown = (element) => element.getClientRects().length > 0;

  /** Drawn: the canvas has had frames to place elements, and they to measure themselves. */
  async function settled() {
    await pause(100);
    for (let i = 0; i < 3; i++) await frame();
  }

  function ready() {
    if (!window.app?.canvas?.graph || !window.LiteGraph) return false;
    // The default workflow is the last thing a start loads.
    return Object.keys(LiteGraph.registered_node_types).length > 100 && graph()._nodes.length > 0;
  }

  async function load(workflow) {
    await app.loadGraphData(workflow);
    await settled();
  }

  async function clear() {
    for (const close of document.querySelectorAll(CLOSE)) close.click();
    await app.loadGraphData({ version: 0.4, nodes: [], links: [], groups: [], last_node_id: 0, last_link_id: 0 });
    await settled();
  }

  async function drop(name, bytes) {
    const types = { png: "image/png", mp4: "video/mp4", json: "application/json", webp: "image/webp" };
    const file = new File([new Uint8Array(bytes)], name, { type: types[name.split(".").at(-1)] });
    await app.handleFile(file);
    await settled();
    console.log(`dropped ${name}`);
  }

  const prompt = async () => (await app.graphToPrompt()).output;
  const saved = () => JSON.stringify(graph().serialize());
  const isMissing = (node) => !LiteGraph.registered_node_types[node.type];
  const missing = () => graph()._nodes.filter(isMissing).map((node) => node.type);
  const outlines = (node) => ["error", "executionError"].map((name) => node.strokeStyles?.[name]?.call(node));
  const isRed = (node) => Boolean(node.has_errors || app.lastNodeErrors?.[node.id] || outlines(node).some(Boolean));
  const red = () => graph()._nodes.filter(isRed).map((node) => node.title);
  const alerts = () => [...document.querySelectorAll(NOTICES)].filter(shown).map((one) => one.innerText);

  function corners() {
    const places = [
      ...graph()._nodes.map(({ pos, size }) => [pos[0], pos[1] - TITLE, pos[0] + size[0], pos[1] + size[1]]),
      ...graph()._groups.map(({ pos, size }) => [pos[0], pos[1], pos[0] + size[0], pos[1] + size[1]]),
    ];
    const of = (index, choose) => Math.round(choose(...places.map((place) => place[index])));
    return [of(0, Math.min), of(1, Math.min), of(2, Math.max), of(3, Math.max)];
  }

  /** Shows the whole graph; returns where on the page it lies, with a margin of so many pixels. */
  async function fit(margin) {
    const [left, top, right, bottom] = corners();
    const canvas = app.canvas.canvas.getBoundingClientRect();
    const { ds } = app.canvas;
    const [width, height] = [right - left, bottom - top];
    ds.scale = Math.min((canvas.width - 2 * margin) / width, (canvas.height - 2 * margin) / height);
    ds.offset[0] = -left + margin / ds.scale;
    ds.offset[1] = -top + margin / ds.scale;
    app.canvas.setDirty(true, true);
    await settled();
    const size = (length) => Math.round(length * ds.scale) + 2 * margin;
    return { x: canvas.x, y: canvas.y, width: size(width), height: size(height) };
  }

  /** Elements of a node that hide a part of their text. */
  function cut(node) {
    const elements = (node.widgets ?? []).flatMap(({ element }) =>
      element instanceof Element ? [element, ...element.querySelectorAll("*")] : [],
    );
    const scrolls = (element) => /auto|scroll|hidden/.test(getComputedStyle(element).overflowY);
    // A note has its raw text behind it, to be edited.
    const seen = (element) => shown(element) && element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
    return elements.filter((one) => seen(one) && scrolls(one) && one.scrollHeight > one.clientHeight + 1).length;
  }

  function describeNode(node) {
    const { id, type, title, pos, size, mode } = node;
    const notes = (node.widgets ?? []).filter(() => /Note$/.test(type)).map((widget) => widget.value);
    const parts = { id, type, title, mode, pos: [...pos], size: [...size], smallest: [...node.computeSize()] };
    return { ...parts, cut: cut(node), note: notes[0] ?? null };
  }

  /** A link, and whether both of its ends know it. */
  function describeLink({ id, origin_id, origin_slot, target_id, target_slot, type }) {
    const output = graph().getNodeById(origin_id)?.outputs?.[origin_slot];
    const input = graph().getNodeById(target_id)?.inputs?.[target_slot];
    return { id, type, whole: Boolean(output?.links?.includes(id) && input?.link === id) };
  }

  /** All that is drawn, as plain data. */
  async function describe() {
    await fit(0);
    const links = graph().links;
    return {
      nodes: graph()._nodes.map(describeNode),
      groups: graph()._groups.map(({ title, pos, size }) => ({ title, pos: [...pos], size: [...size] })),
      links: [...(links.values?.() ?? Object.values(links))].map(describeLink),
    };
  }

  return { ready, load, clear, drop, prompt, saved, missing, red, alerts, fit, settled, describe };
})();
