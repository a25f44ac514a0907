// The timeline's arithmetic without a page: `node --test tests/ui/segments.test.mjs`; test_segments.py runs it.

import assert from "node:assert/strict";
import { test } from "node:test";

import { Run, nodeAt, segmentOf } from "../../comfy_nodes/web/js/progress.js";
import { History, joined, moved, parsePrompts, pasted, plan, removed, split } from "../../comfy_nodes/web/js/segments.js";

const INPUTS = { numFrames: 93, numCondFrames: 13, frameRate: 15, numSegments: 0 };

test("edits give new lists and leave the old one", () => {
  const prompts = Object.freeze(["ab", "cd", "ef"]);
  assert.deepEqual(split(prompts, 1, 1), ["ab", "c", "d", "ef"]);
  assert.deepEqual(split(prompts, 1, 0, 2), ["ab", "", "", "ef"]);
  assert.deepEqual(joined(prompts, 1), { prompts: ["abcd", "ef"], caret: 2 });
  assert.deepEqual(moved(prompts, 0, 2), ["cd", "ef", "ab"]);
  assert.deepEqual(moved(prompts, 2, 0), ["ef", "ab", "cd"]);
  assert.deepEqual(removed(prompts, 0), ["cd", "ef"]);
  assert.deepEqual(removed(["ab"], 0), [""]);
  assert.deepEqual(pasted(prompts, 1, 1, 1, "x\n\ny"), { prompts: ["ab", "cx", "yd", "ef"], index: 2, caret: 1 });
  assert.deepEqual(pasted(prompts, 1, 0, 2, "x"), { prompts: ["ab", "x", "ef"], index: 1, caret: 1 });
});

test("the first segment is longer than the others", () => {
  const { segments, seconds, count } = plan(["a", "b", "", "c"], INPUTS);
  const frames = segments.map(({ span }) => Math.round((span.end - span.start) * 15));
  assert.deepEqual(frames, [93, 80, 80]);
  assert.deepEqual(segments.map(({ card }) => card), [0, 1, 3]);
  assert.equal(Math.round(seconds * 15), 253);
  assert.equal(count, 3);
});

test("what a link decides is unknown", () => {
  assert.equal(plan(["a"], { ...INPUTS, frameRate: null }).seconds, null);
  assert.equal(plan(["a"], { ...INPUTS, numSegments: null }).count, null);
  assert.equal(plan(["a", "b"], { ...INPUTS, numSegments: null }).count, 2);
});

test("one prompt may be for a thousand segments", () => {
  const { segments, repeats, cards } = plan(["a"], { ...INPUTS, numSegments: 1000 });
  assert.equal(segments.length, 1000);
  assert.equal(repeats, 1000);
  assert.equal(cards[0].span.end, segments.at(-1).span.end);
});

test("history is limited and typing is one step", () => {
  const history = new History(["0"]);
  for (let i = 1; i <= 300; i += 1) history.push([String(i)], 0);
  let steps = 0;
  while (history.undo()) steps += 1;
  assert.equal(steps, 199);
  history.push(["a"], 0, { typed: true, time: 0 });
  history.push(["ab"], 0, { typed: true, time: 900 });
  history.push(["abc"], 0, { typed: true, time: 2000 });
  assert.deepEqual(history.undo().prompts, ["ab"]);
  assert.equal(history.redo().prompts[0], "abc");
  assert.equal(history.redo(), null);
});

test("progress is a part of the segment that runs, whatever number of steps each has", () => {
  const run = new Run("");
  const parts = () => [0, 1, 2].map((index) => Number(run.done(index, 1, 3).toFixed(2)));
  const max = 2 + 11 + 11;
  run.step(1, max);
  assert.deepEqual(parts(), [0.13, 0, 0]);
  run.step(2, max);
  run.finish(0, "a");
  assert.deepEqual(parts(), [1, 0, 0]);
  run.step(2 + 5.5, max);
  assert.deepEqual(parts(), [1, 0.5, 0]);
  run.step(13, max);
  run.finish(1, "b");
  run.step(24, max);
  assert.deepEqual(parts(), [1, 1, 1]);
  run.end();
  assert.deepEqual(parts(), [1, 1, 0]);
  run.finish(2, "c");
  assert.deepEqual(parts(), [1, 1, 1]);
  assert.equal(run.done(0, 3, 3), 1);
});

test("segments that were kept come before the first step", () => {
  const run = new Run("");
  run.finish(0, "a");
  run.step(11, 30);
  assert.equal(run.done(1, 1, 3).toFixed(1), "0.1");
  run.step(20, 30);
  assert.equal(run.done(1, 1, 3), 1);
  assert.equal(run.done(2, 1, 3), 0);
});

test("files and nodes by name", () => {
  assert.equal(segmentOf("7_2_0012.mp4"), 12);
  assert.ok(Number.isNaN(segmentOf("ComfyUI_00001_.png")) && Number.isNaN(segmentOf(undefined)));
  const inner = { id: 2 };
  const graph = (node) => ({ getNodeById: (id) => (id === node.id ? node : undefined) });
  assert.equal(nodeAt(graph({ id: 7, subgraph: graph(inner) }), "7:2"), inner);
  assert.equal(nodeAt(graph({ id: 7 }), "8"), null);
});

test("a line at the end does not count", () => {
  assert.deepEqual(parsePrompts(""), [""]);
  assert.deepEqual(parsePrompts("a\n\n"), ["a"]);
  assert.deepEqual(parsePrompts("\na"), ["", "a"]);
});
