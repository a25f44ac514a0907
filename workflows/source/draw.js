// Draws a workflow in ComfyUI's front end and returns { workflow, prompt } as JSON. Runs inside its page; `spec` is a
// Workflow of graphs.py as plain data.
async (spec) => {
  // Of groups: around their nodes, and above them for the titles of both.
  const [MARGIN, TITLES] = [20, 60];
  const app = window.app ?? window.comfyAPI.app.app;
  const LiteGraph = window.LiteGraph;
  app.graph.clear();
  const made = {};
  for (const node of spec.nodes) {
    const drawn = LiteGraph.createNode(node.type);
    if (!drawn) throw new Error(`the front end does not know ${node.type}`);
    drawn.pos = [...node.at];
    app.graph.add(drawn);
    if (node.title) drawn.title = node.title;
    if (node.models.length) drawn.properties.models = node.models;
    if (node.muted) drawn.mode = LiteGraph.NEVER;
    for (const [name, value] of Object.entries(node.values)) {
      const widget = drawn.widgets?.find((one) => one.name === name);
      if (!widget) throw new Error(`${node.type} has no widget ${name}`);
      widget.value = value;
    }
    const smallest = drawn.computeSize();
    drawn.setSize([Math.max(node.size[0], smallest[0]), Math.max(node.size[1], smallest[1])]);
    made[node.key] = drawn;
  }
  for (const node of spec.nodes) {
    for (const [name, [key, output]] of Object.entries(node.links)) {
      const target = made[node.key];
      let input = target.findInputSlot(name);
      if (input < 0 && target.convertWidgetToInput) {
        target.convertWidgetToInput(target.widgets.find((one) => one.name === name));
        input = target.findInputSlot(name);
      }
      if (input < 0) throw new Error(`${node.type} has no input ${name}`);
      made[key].connect(output, target, input);
    }
  }
  for (const group of spec.groups) {
    const members = group.nodes.map((key) => made[key]);
    const sides = [0, 1].map((axis) => [
      Math.min(...members.map(({ pos }) => pos[axis])),
      Math.max(...members.map(({ pos, size }) => pos[axis] + size[axis])),
    ]);
    const [[left, right], [top, bottom]] = sides;
    const drawn = new LiteGraph.LGraphGroup(group.title);
    drawn.pos = [left - MARGIN, top - TITLES];
    drawn.size = [right - left + 2 * MARGIN, bottom - top + TITLES + MARGIN];
    drawn.color = group.colour;
    app.graph.add(drawn);
  }
  const [at, size, text] = spec.note;
  const note = LiteGraph.createNode("MarkdownNote");
  note.pos = [...at];
  note.title = "Read me";
  app.graph.add(note);
  note.widgets[0].value = text;
  note.setSize([...size]);
  const workflow = app.graph.serialize();
  const { output } = await app.graphToPrompt();
  // As text: an object would come over with null for what is undefined, which the front end does not take back.
  return JSON.stringify({ workflow, prompt: output });
}
