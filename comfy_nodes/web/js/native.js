// What 0 frames stands for: the counts that the checkpoint is made for, found by following the model link upstream.

export const OFFICIAL = { numFrames: 93, numCondFrames: 13 };
export const MINIATURE = { numFrames: 17, numCondFrames: 9 };

const LOADER = "LongCatVideoLoader";
const BUILT_IN = "miniature (built in)";
const TYPE = "MODEL";
// The node that stands for a subgraph's inputs has this id in every subgraph; a string in newer front ends.
const SUBGRAPH_INPUT = -10;
// Links can form a loop through nodes that no job could run.
const MAX_HOPS = 100;

/** @returns {{numFrames: number, numCondFrames: number}} the official ones where the checkpoint cannot be told */
export function nativeCounts(node) {
  const loader = loaderOf(node);
  if (!loader || isLinked(loader, "checkpoint")) return OFFICIAL;
  const widget = loader.widgets?.find((each) => each.name === "checkpoint");
  return widget?.value === BUILT_IN ? MINIATURE : OFFICIAL;
}

/** @returns {boolean} whether a link decides over the input of this name */
export function isLinked(node, name) {
  return Boolean(node.inputs?.some((input) => input.name === name && input.link != null));
}

function loaderOf(node) {
  let place = node;
  for (let hop = 0; place && hop < MAX_HOPS; hop += 1) {
    const input = modelInput(place);
    place = input && outOfSubgraph(originOf(place.graph, input.link));
    if (place?.type === LOADER) return place;
  }
  return null;
}

/** The input that the model comes in by; a reroute has only one, of any type. */
function modelInput(node) {
  const linked = node.inputs?.filter((input) => input.link != null) ?? [];
  return linked.find((input) => input.type === TYPE) ?? (linked.length === 1 ? linked[0] : null);
}

/** @returns {{node: object, slot: number}|null} where a link begins; for a subgraph's input, where it begins outside */
function originOf(graph, id) {
  const link = graph?.getLink?.(id) ?? graph?.links?.[id];
  if (!link) return null;
  if (Number(link.origin_id) !== SUBGRAPH_INPUT) return { node: graph.getNodeById(link.origin_id), slot: link.origin_slot };
  const host = hostOf(graph);
  const outside = host?.inputs?.[link.origin_slot]?.link;
  return outside == null ? null : originOf(host.graph, outside);
}

/** The node that shows a subgraph; the first of several. */
function hostOf(graph) {
  const root = graph.rootGraph;
  const graphs = root ? [root, ...(root.subgraphs?.values() ?? [])] : [];
  return graphs.flatMap((each) => each.nodes ?? []).find((node) => node.subgraph === graph);
}

/** Of a node that shows a subgraph, the inner node that its output is from. */
function outOfSubgraph(origin) {
  const { node, slot } = origin ?? {};
  if (!node?.subgraph) return node;
  const [inner] = node.subgraph.outputs?.[slot]?.linkIds ?? [];
  return outOfSubgraph(originOf(node.subgraph, inner));
}
