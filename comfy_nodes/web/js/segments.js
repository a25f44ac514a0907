// The segments of a long video as plain data. No DOM here; tests/ui/segments.test.mjs runs this file in Node.

/** What Python's str.splitlines() splits at, so that a card here is a segment there. */
const LINE_BREAK = /\r\n|[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]/;
const TYPING_PAUSE_MS = 1000;
const MAX_HISTORY = 200;

const isBlank = (prompt) => prompt.trim() === "";

/** @returns {string[]} one prompt per line, at least one; line breaks at the end do not count */
export function parsePrompts(text) {
  const lines = text.split(LINE_BREAK);
  while (lines.length > 1 && lines.at(-1) === "") lines.pop();
  return lines;
}

/** @param {string[]} prompts  @returns {string} the value of the node's `prompts` input */
export const formatPrompts = (prompts) => prompts.join("\n");

/** A prompt is one line: line breaks become spaces. */
export const oneLine = (text) => text.split(LINE_BREAK).join(" ");

export const inserted = (prompts, index, prompt = "") => prompts.toSpliced(index, 0, prompt);

/** The last card stays, empty. */
export const removed = (prompts, index) => (prompts.length > 1 ? prompts.toSpliced(index, 1) : [""]);

export function moved(prompts, from, to) {
  return prompts.toSpliced(from, 1).toSpliced(to, 0, prompts[from]);
}

/** Text after the caret goes to a new card; a selection is dropped, as a typed key drops it. */
export function split(prompts, index, start, end = start) {
  const prompt = prompts[index];
  return prompts.toSpliced(index, 1, prompt.slice(0, start), prompt.slice(end));
}

/** A card joins the one before it; the caret belongs where they meet. */
export function joined(prompts, index) {
  const before = prompts[index - 1];
  return { prompts: prompts.toSpliced(index - 1, 2, before + prompts[index]), caret: before.length };
}

/**
 * Pasted lines replace the selection [start, end) of a card: the first goes on in it, every other line is a new card.
 * @returns {{prompts: string[], index: number, caret: number}} with the card and place where the caret belongs
 */
export function pasted(prompts, index, start, end, text) {
  const lines = text.split(LINE_BREAK).filter((line) => !isBlank(line));
  if (!lines.length) lines.push(oneLine(text));
  const caret = lines.at(-1).length + (lines.length === 1 ? start : 0);
  lines[0] = prompts[index].slice(0, start) + lines[0];
  lines[lines.length - 1] += prompts[index].slice(end);
  return { prompts: prompts.toSpliced(index, 1, ...lines), index: index + lines.length - 1, caret };
}

/**
 * When each segment plays. The first lasts num_frames, each other one adds num_frames - num_cond_frames; so does the
 * first if the node goes on from a video, which is not in the result. Empty cards are no segments.
 *
 * @typedef {{start: number, end: number}|null} Span in seconds; null where unknown
 * @param {string[]} prompts
 * @param {object} inputs numbers of the node; null where a link decides
 * @returns {{cards: {number: number|null, span: Span}[], segments: {card: number, span: Span}[], count: number|null,
 *   seconds: number|null, repeats: number, conflict: number}} number: of a card's first segment, from 1; count and
 *   seconds are null where unknown; repeats: segments that one prompt is for; conflict: num_segments if it contradicts
 *   the prompts, else 0
 */
export function plan(prompts, { numFrames, numCondFrames, frameRate, numSegments = 0, fromVideo = false }) {
  const filled = prompts.filter((prompt) => !isBlank(prompt)).length;
  const repeated = filled === 1 && numSegments !== 0;
  const count = repeated ? numSegments : filled;
  const timed = count !== null && [numFrames, numCondFrames, frameRate].every(Number.isFinite);
  const step = numFrames - numCondFrames;
  const first = fromVideo ? step : numFrames;
  const known = timed && frameRate > 0 && first > 0 && (step > 0 || count <= 1);
  const end = (segments) => (segments ? (first + (segments - 1) * step) / frameRate : 0);
  const span = (index, length) => (known ? { start: end(index), end: end(index + length) } : null);
  const repeats = repeated && count ? count : 1;
  const cards = [];
  const segments = [];
  for (const [card, prompt] of prompts.entries()) {
    if (isBlank(prompt)) cards.push({ number: null, span: null });
    else cards.push({ number: segments.length + 1, span: span(segments.length, repeats) });
    const length = isBlank(prompt) ? 0 : repeats;
    for (let i = 0; i < length; i += 1) segments.push({ card, span: span(segments.length, 1) });
  }
  return {
    cards,
    segments,
    count,
    seconds: known ? end(count) : null,
    repeats,
    conflict: filled > 1 && numSegments > 0 && numSegments !== filled ? numSegments : 0,
  };
}

/** Undo and redo inside the timeline. Typing in one card without a pause is one step. */
export class History {
  /** @param {string[]} prompts */
  constructor(prompts) {
    this.states = [{ prompts, index: 0 }];
    this.place = 0;
    this.typing = { index: -1, time: -Infinity };
  }

  /** @param {{typed?: boolean, time?: number}} how typed: this came from a key in card `index`; time in ms */
  push(prompts, index, { typed = false, time = 0 } = {}) {
    const goesOn = typed && this.typing.index === index && time - this.typing.time < TYPING_PAUSE_MS;
    if (!goesOn) this.place += 1;
    this.states.splice(this.place, Infinity, { prompts, index });
    if (this.states.length > MAX_HISTORY) this.states.shift();
    this.place = this.states.length - 1;
    this.typing = typed ? { index, time } : { index: -1, time: -Infinity };
  }

  /** @returns {{prompts: string[], index: number}|null} the state to show and the card to focus; null: no such step */
  undo() {
    if (this.place === 0) return null;
    const { index } = this.states[this.place];
    this.place -= 1;
    return this.#arrive(index);
  }

  redo() {
    if (this.place === this.states.length - 1) return null;
    this.place += 1;
    return this.#arrive(this.states[this.place].index);
  }

  #arrive(index) {
    this.typing = { index: -1, time: -Infinity };
    const { prompts } = this.states[this.place];
    return { prompts, index: Math.min(index, prompts.length - 1) };
  }
}
