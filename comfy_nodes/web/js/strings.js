// Words of the timeline. {…} is filled in by `translator`.

const EN = {
  timeline: "Segments, one prompt each",
  segment: "Segment {n} of {count}",
  lone: "Segment {n}",
  empty: "Empty card, no segment",
  prompt: "Prompt of card {n}",
  placeholder: "Prompt of this segment",
  add: "Add segment",
  duplicate: "Duplicate (Ctrl+D)",
  remove: "Delete",
  grip: "Drag to move (Alt+↑, Alt+↓)",
  asText: "Edit as text, or connect a link",
  asCards: "Edit as segments",
  seconds: "{value} s",
  span: "{start} – {end} s",
  one: "1 segment",
  many: "{count} segments",
  none: "no prompt yet",
  unknown: "segments by link",
  conflict: "{prompts} prompts, but num_segments is {count}",
  added: "Card {n} added",
  removed: "Card {n} deleted",
  moved: "Moved to place {n} of {count}",
  finished: "Segment {n} is finished",
  isDone: "finished",
  undone: "Undone",
  redone: "Redone",
};

const DE = {
  timeline: "Segmente, je ein Prompt",
  segment: "Segment {n} von {count}",
  lone: "Segment {n}",
  empty: "Leere Karte, kein Segment",
  prompt: "Prompt der Karte {n}",
  placeholder: "Prompt dieses Segments",
  add: "Segment hinzufügen",
  duplicate: "Duplizieren (Strg+D)",
  remove: "Löschen",
  grip: "Zum Verschieben ziehen (Alt+↑, Alt+↓)",
  asText: "Als Text bearbeiten oder verbinden",
  asCards: "Als Segmente bearbeiten",
  one: "1 Segment",
  many: "{count} Segmente",
  none: "noch kein Prompt",
  unknown: "Segmente über Verbindung",
  conflict: "{prompts} Prompts, aber „Segmente“ ist {count}",
  added: "Karte {n} hinzugefügt",
  removed: "Karte {n} gelöscht",
  moved: "An Platz {n} von {count} verschoben",
  finished: "Segment {n} ist fertig",
  isDone: "fertig",
  undone: "Rückgängig gemacht",
  redone: "Wiederhergestellt",
};

const ZH = {
  timeline: "片段，每段一条提示词",
  segment: "第 {n} 段，共 {count} 段",
  lone: "第 {n} 段",
  empty: "空卡片，不生成片段",
  prompt: "第 {n} 张卡片的提示词",
  placeholder: "本段的提示词",
  add: "添加片段",
  duplicate: "复制（Ctrl+D）",
  remove: "删除",
  grip: "拖动以移动（Alt+↑、Alt+↓）",
  asText: "以文本编辑，或连接输入",
  asCards: "以片段编辑",
  seconds: "{value} 秒",
  span: "{start} – {end} 秒",
  one: "1 段",
  many: "{count} 段",
  none: "还没有提示词",
  unknown: "片段数由连线决定",
  conflict: "有 {prompts} 条提示词，但片段数为 {count}",
  added: "已添加第 {n} 张卡片",
  removed: "已删除第 {n} 张卡片",
  moved: "已移到第 {n} 位，共 {count} 位",
  finished: "第 {n} 段已完成",
  isDone: "已完成",
  undone: "已撤销",
  redone: "已重做",
};

/**
 * @param {string|undefined} locale the front end's `Comfy.Locale`, such as "en", "de" or "zh-TW"
 * @returns {(key: string, values?: object) => string} numbers with a fraction get one digit of it
 */
export function translator(locale = "en") {
  const words = { ...EN, ...{ de: DE, zh: ZH }[locale.slice(0, 2)] };
  const seconds = new Intl.NumberFormat(locale, { minimumFractionDigits: 1, maximumFractionDigits: 1 });
  const shown = (name, value) => (["start", "end", "value"].includes(name) ? seconds.format(value) : String(value));
  return (key, values = {}) => words[key].replace(/\{(\w+)\}/g, (_, name) => shown(name, values[name]));
}
