// How far a node's job has come, segment by segment. No DOM here; tests/ui/segments.test.mjs runs this file in Node.

/** The job that runs on the node, or the last one that did. */
export class Run {
  /** @param {string} text the prompts it was started with */
  constructor(text) {
    this.text = text;
    /** @type {string[]} addresses of the finished segments' videos */
    this.videos = [];
    this.part = 0;
    this.active = true;
  }

  get finished() {
    return this.videos.length;
  }

  finish(index, video) {
    this.videos[index] = video;
  }

  /** `value` of `max` steps are done, over all segments. */
  step(value, max) {
    if (max > 0) this.part = value / max;
  }

  end() {
    this.active = false;
  }

  /** @returns {number} how much of `length` segments from `index` on is done, of `count` in all; 0 to 1 */
  done(index, length, count) {
    const running = this.active ? Math.min(1, Math.max(0, this.part * count - this.finished)) : 0;
    return Math.min(1, Math.max(0, (this.finished + running - index) / length));
  }
}

/** @returns {number} the index of the segment that a preview's file holds, as in "2_0001.mp4"; NaN: none */
export const segmentOf = (filename) => Number(/_(\d+)\.\w+$/.exec(filename ?? "")?.[1] ?? NaN);

/** @returns {object|null} the node that an execution id such as "7" or, in subgraphs, "7:2" stands for */
export function nodeAt(root, id) {
  let node = null;
  let graph = root;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById?.(part) ?? graph?.getNodeById?.(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}
