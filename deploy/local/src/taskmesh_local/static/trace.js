// One trace: rows that fold, details that are fetched when they are opened, a keyboard that reaches all of it, and zoom.
"use strict";

const grid = document.querySelector("[role=treegrid]");
const rows = [...grid.querySelectorAll(".row")];
const place = new Map(rows.map((row, index) => [row, index]));
const whole = Number(grid.dataset.whole);
const number = (row, name) => Number(row.dataset[name]);
const isFolded = (row) => row.getAttribute("aria-expanded") === "false";
const canFold = (row) => row.hasAttribute("aria-expanded");
const shown = (row) => !row.hidden;

// Folding ----------------------------------------------------------------------------------------------------------

function setHidden(row, hidden) {
  row.hidden = hidden;
  if (row.details) row.details.hidden = hidden;
}

function fold(row, folded) {
  if (!canFold(row)) return;
  row.setAttribute("aria-expanded", String(!folded));
  const first = place.get(row) + 1;
  const end = first + number(row, "below");
  for (let index = first; index < end;) {
    setHidden(rows[index], folded);
    // What is folded inside stays so.
    index += !folded && isFolded(rows[index]) ? number(rows[index], "below") + 1 : 1;
  }
}

function foldAll(folded) {
  // From the end, so that outer rows find the inner ones as they shall be.
  for (const row of [...rows].reverse()) if (!folded || row.getAttribute("aria-level") !== "1") fold(row, folded);
  if (!shown(current)) focus(visibleAbove(current));
}

function parentOf(row) {
  const level = Number(row.getAttribute("aria-level"));
  for (let index = place.get(row) - 1; index >= 0; index--) {
    if (Number(rows[index].getAttribute("aria-level")) < level) return rows[index];
  }
  return null;
}

function visibleAbove(row) {
  while (!shown(row)) row = parentOf(row);
  return row;
}

function reveal(row) {
  for (let above = parentOf(row); above; above = parentOf(above)) if (isFolded(above)) fold(above, false);
}

// Details ----------------------------------------------------------------------------------------------------------

async function fetchDetails(address) {
  try {
    const answer = await fetch(address, { headers: { Accept: "text/html" } });
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    const detail = fresh.querySelector(".detail");
    if (detail) return detail;
  } catch {
    // Told below.
  }
  const sorry = document.createElement("p");
  sorry.className = "detail bad";
  sorry.textContent = "The details could not be fetched. Close and open them to try again.";
  return sorry;
}

async function open(row) {
  const link = row.querySelector("a.text");
  if (!link || row.details) return;
  const around = document.createElement("div");
  around.className = "inside";
  around.setAttribute("role", "row");
  around.innerHTML = '<div role="gridcell"></div>';
  row.details = around;
  row.classList.add("open");
  const detail = await fetchDetails(link.href);
  if (row.details !== around) return;
  around.firstChild.append(detail);
  around.hidden = row.hidden;
  row.after(around);
  history.replaceState(null, "", `#${row.id}`);
}

function close(row) {
  if (!row.details) return false;
  const inside = row.details.contains(document.activeElement);
  row.details.remove();
  row.details = null;
  row.classList.remove("open");
  if (location.hash === `#${row.id}`) history.replaceState(null, "", location.pathname);
  if (inside) focus(row);
  return true;
}

function toggle(row) {
  if (!row.querySelector("a.text")) fold(row, !isFolded(row));
  else if (!close(row)) open(row);
}

// Zoom -------------------------------------------------------------------------------------------------------------

let drawn = null;

function remember() {
  // Where everything is in the whole trace, in shares of it.
  const share = (element, name) => parseFloat(element.getAttribute(name)) / 100;
  const bars = [...grid.querySelectorAll(".lane rect")].map((bar) => [bar, share(bar, "x"), share(bar, "width")]);
  const pins = [...grid.querySelectorAll(".pin")].map((pin) => [pin, share(pin.firstElementChild, "cx")]);
  return { bars, pins };
}

function roundStep(about) {
  const power = 10 ** Math.floor(Math.log10(about));
  return [1, 2, 5, 10].map((factor) => factor * power).reduce((a, b) => (Math.abs(a - about) <= Math.abs(b - about) ? a : b));
}

function tickText(ms) {
  const short = (value) => String(Number(value.toPrecision(6)));
  if (!ms) return "0";
  if (ms < 1) return `${short(ms * 1000)} µs`;
  return ms < 1000 ? `${short(ms)} ms` : `${short(ms / 1000)} s`;
}

function svg(name, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}

function drawTicks(from, to) {
  const step = roundStep((to - from) / 5);
  const ticks = [];
  for (let tick = Math.ceil(from / step) * step; tick <= to; tick += step) ticks.push(tick);
  const at = (tick) => `${(100 * (tick - from)) / (to - from)}%`;
  document.querySelector(".ticks").replaceChildren(...ticks.map((tick) => svg("text", { x: at(tick), y: 12 }, tickText(tick))));
  document.querySelector(".grid svg").replaceChildren(...ticks.map((tick) => svg("rect", { x: at(tick), width: 1, height: "100%" })));
}

function zoom(from, to) {
  drawn ??= remember();
  const wide = to - from;
  const at = (share) => ((share * whole - from) / wide) * 100;
  for (const [bar, x, width] of drawn.bars) {
    // Cut off at both edges: outside there are names and numbers.
    const [left, right] = [at(x), at(x + width)].map((edge) => Math.min(Math.max(edge, 0), 100));
    const out = right <= 0 || left >= 100;
    bar.setAttribute("x", `${left}%`);
    bar.setAttribute("width", out ? "0" : `${Math.max(right - left, 0.2)}%`);
  }
  for (const [pin, x] of drawn.pins) {
    const middle = at(x);
    pin.toggleAttribute("display", false);
    if (middle < 0 || middle > 100) pin.setAttribute("display", "none");
    pin.querySelector("circle").setAttribute("cx", `${middle}%`);
    pin.querySelector("text").setAttribute("x", `${middle}%`);
  }
  drawTicks(from, to);
  document.getElementById("whole").hidden = from === 0 && to === whole;
}

function zoomTo(row) {
  const [from, to] = [number(row, "from"), number(row, "to")];
  const margin = (to - from) * 0.04 || whole * 0.001;
  zoom(Math.max(0, from - margin), Math.min(whole, to + margin));
}

// Focus and keys ---------------------------------------------------------------------------------------------------

let current = rows[0];

function focus(row, { scroll = true } = {}) {
  current.tabIndex = -1;
  current = row;
  row.tabIndex = 0;
  row.focus({ preventScroll: true });
  if (scroll) row.scrollIntoView({ block: "nearest" });
}

function step(row, by) {
  for (let index = place.get(row) + by; rows[index]; index += by) if (shown(rows[index])) return rows[index];
  return row;
}

function left(row) {
  if (canFold(row) && !isFolded(row)) fold(row, true);
  else focus(parentOf(row) ?? row);
}

function right(row) {
  if (isFolded(row)) fold(row, false);
  else if (canFold(row)) focus(step(row, 1));
}

const KEYS = {
  ArrowDown: (row) => focus(step(row, 1)),
  ArrowUp: (row) => focus(step(row, -1)),
  ArrowLeft: left,
  ArrowRight: right,
  Home: () => focus(rows[0]),
  End: () => focus(rows.findLast(shown)),
  Enter: toggle,
  " ": toggle,
  z: zoomTo,
};

grid.addEventListener("keydown", (event) => {
  const row = event.target.closest(".row");
  if (event.key === "Escape") {
    const opened = row ?? event.target.closest(".inside")?.previousElementSibling;
    if (!opened || !close(opened)) zoom(0, whole);
    return;
  }
  if (event.target !== row || event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key](row);
});

grid.addEventListener("click", (event) => {
  if (event.target.closest("[data-zoom]")) return zoomTo(event.target.closest(".inside").previousElementSibling);
  const row = event.target.closest(".row");
  // With a modifier, the link opens where the person wants it.
  if (!row || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  if (!getSelection().isCollapsed) return;
  focus(row, { scroll: false });
  if (event.target.closest(".twisty") && canFold(row)) fold(row, !isFolded(row));
  else toggle(row);
});

// A span that an address names is opened and in sight.
function goToHash() {
  const row = rows.find((each) => each.id && `#${each.id}` === location.hash);
  if (!row) return;
  reveal(row);
  focus(row, { scroll: false });
  open(row);
  row.scrollIntoView({ block: "center" });
  row.classList.add("found");
  row.addEventListener("animationend", () => row.classList.remove("found"), { once: true });
}

for (const row of rows) {
  row.tabIndex = row === current ? 0 : -1;
  for (const link of row.querySelectorAll("a")) link.tabIndex = -1;
}
for (const later of document.querySelectorAll(".buttons, .keys")) later.hidden = false;
document.getElementById("fold")?.addEventListener("click", () => foldAll(true));
document.getElementById("unfold")?.addEventListener("click", () => foldAll(false));
document.getElementById("whole").addEventListener("click", () => zoom(0, whole));
addEventListener("hashchange", goToHash);
goToHash();
