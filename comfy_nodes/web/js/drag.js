// Reordering the items of a list with a pointer. Items are shifted by transforms and moved once, at the end, because a
// node that is moved in the document loses its pointer capture.

const EDGE_PX = 24;
const SCROLL_PX = 6;

/**
 * @param {{top: number, height: number}[]} items in order
 * @param {number} top where the upper edge of item `from` is held
 * @returns {number} its place: it passes a neighbour when its leading edge passes the neighbour's middle
 */
export function placeOf(items, from, top) {
  const bottom = top + items[from].height;
  const edge = (index) => (index < from ? top : bottom);
  return items.filter((item, index) => index !== from && item.top + item.height / 2 < edge(index)).length;
}

/** How far item `index` makes room while `from` is held over place `to`. */
function room(index, from, to, step) {
  if (index > from && index <= to) return -step;
  return index < from && index >= to ? step : 0;
}

/**
 * @param {HTMLElement} list its children are the items; they are dragged by elements of class "lcv-grip"
 * @param {HTMLElement} scroller the scroll container around the list
 * @param {(from: number, to: number) => void} move called once, when an item is dropped at another place
 * @returns {() => void} cancels the drag that is going on, if any
 */
export function makeSortable(list, scroller, move) {
  let drag = null;

  function start(event) {
    const grip = event.target.closest(".lcv-grip");
    if (!grip || event.button !== 0 || drag) return;
    event.preventDefault();
    event.stopPropagation();
    const elements = [...list.children];
    const from = elements.indexOf(grip.closest("li"));
    const items = elements.map((item) => ({ top: item.offsetTop, height: item.offsetHeight }));
    // The canvas scales the node: pointer distances are on the screen, offsets are not.
    const scale = list.getBoundingClientRect().height / list.offsetHeight || 1;
    const gap = items.length > 1 ? items[1].top - items[0].top - items[0].height : 0;
    drag = { elements, items, from, to: from, scale, gap, y: event.clientY, startY: event.clientY, grip };
    drag.startScroll = scroller.scrollTop;
    grip.setPointerCapture(event.pointerId);
    list.classList.add("lcv-sorting");
    elements[from].classList.add("lcv-held");
    window.addEventListener("keydown", escape, true);
    drag.frame = requestAnimationFrame(follow);
  }

  function escape(event) {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    stop();
  }

  function follow() {
    if (!drag) return;
    const { elements, items, from, scale, gap } = drag;
    const frame = scroller.getBoundingClientRect();
    if (drag.y < frame.top + EDGE_PX * scale) scroller.scrollTop -= SCROLL_PX;
    if (drag.y > frame.bottom - EDGE_PX * scale) scroller.scrollTop += SCROLL_PX;
    const held = items[from];
    const last = items.at(-1);
    const wanted = (drag.y - drag.startY) / scale + scroller.scrollTop - drag.startScroll;
    const dy = Math.max(items[0].top - held.top, Math.min(wanted, last.top + last.height - held.top - held.height));
    drag.to = placeOf(items, from, held.top + dy);
    elements.forEach((element, index) => {
      const shift = index === from ? dy : room(index, from, drag.to, held.height + gap);
      element.style.transform = shift ? `translateY(${shift}px)` : "";
    });
    drag.frame = requestAnimationFrame(follow);
  }

  function stop() {
    if (!drag) return null;
    const { elements, from, to } = drag;
    cancelAnimationFrame(drag.frame);
    drag = null;
    window.removeEventListener("keydown", escape, true);
    list.classList.remove("lcv-sorting");
    for (const element of elements) element.style.transform = "";
    elements[from].classList.remove("lcv-held");
    return { from, to };
  }

  list.addEventListener("pointerdown", start);
  list.addEventListener("pointermove", (event) => {
    if (drag) drag.y = event.clientY;
  });
  list.addEventListener("pointerup", (event) => {
    if (!drag) return;
    event.stopPropagation();
    drag.y = event.clientY;
    follow();
    const { from, to } = stop();
    if (from !== to) move(from, to);
  });
  list.addEventListener("pointercancel", stop);
  list.addEventListener("lostpointercapture", stop);
  return stop;
}
