// How far a node's job has come, segment by segment. No DOM here; tests/ui/segments.test.mjs runs this file in Node.

/** The job that runs on the node, or the last one that did. */
export class Run {
  /** @param {string} text the prompts it was started with */
  constructor(text) {
    this.text = text;
    /** @type {string[]} addresses of the finished segments' videos */
    this.videos = [];
    this.value = 0;
    this.max = 0;
    /** Steps before the segment that runs; null: not known yet, segments that were kept came first. */
    this.before = 0;
    this.active = true;
  }

  get finished() {
    return this.videos.length;
  }

  finish(index, video) {
    this.videos[index] = video;
    this.before = this.value || null;
  }

  /** `value` of `max` steps are done, over all segments. */
  step(value, max) {
    this.before ??= value - 1;
    this.value = value;
    this.max = max;
  }

  end() {
    this.active = false;
  }

  /** @returns {number} how much of `length` segments from `index` on is done, of `count` in all; 0 to 1 */
  done(index, length, count) {
    const steps = (this.max - this.before) / (count - this.finished);
    const running = this.active && steps > 0 ? Math.min(1, (this.value - this.before) / steps) : 0;
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
