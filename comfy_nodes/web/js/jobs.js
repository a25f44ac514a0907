// Brings the server's news of running jobs to the timelines of the nodes that run.

import { nodeAt, segmentOf } from "./progress.js";

/**
 * @typedef {object} Timeline what a timeline does with the news
 * @property {() => void} started
 * @property {(value: number, max: number) => void} stepped  so many steps of all are done
 * @property {(index: number, video: string) => boolean} finished  a segment is; returns whether its video is shown
 * @property {() => void} ended
 */

/**
 * @param {object} api the front end's
 * @param {() => object} root gives the graph that execution ids begin in
 * @param {WeakMap<object, Timeline>} timelines by node
 */
export function followJobs(api, root, timelines) {
  const find = (id) => (id == null ? null : timelines.get(nodeAt(root(), id)));
  let running = null;
  const run = (timeline) => {
    running?.ended();
    running = timeline;
    running?.started();
  };
  api.addEventListener("executing", ({ detail }) => run(find(detail?.node ?? detail)));
  for (const end of ["execution_success", "execution_error", "execution_interrupted"]) {
    api.addEventListener(end, () => run(null));
  }
  api.addEventListener("progress", ({ detail }) => find(detail?.node)?.stepped(detail.value, detail.max));
  api.addEventListener("executed", (event) => {
    const { node, display_node: shown, output } = event.detail ?? {};
    const [file] = output?.images ?? [];
    const index = segmentOf(file?.filename);
    if (Number.isNaN(index)) return;
    // The front end cannot show a finished video and the next segment's live preview on one node: it tries to play the
    // preview's picture as a video. So what a timeline shows ends here.
    if (find(shown ?? node)?.finished(index, addressOf(api, file))) event.stopImmediatePropagation();
  });
}

/** Every run writes to the same names, so a number that is new makes the browser load the file again. */
function addressOf(api, file) {
  return api.apiURL(`/view?${new URLSearchParams({ ...file, rand: Date.now() })}`);
}
