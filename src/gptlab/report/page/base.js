"use strict";
// Elements, numbers, and what tables and charts share: which arms are picked, and which one is pointed at.
// Data reaches the page as text nodes and attributes; nothing here or later makes HTML from a string.

const payload = JSON.parse(document.getElementById("payload").textContent);
const SVG = document.getElementById("svg").namespaceURI;

// -- elements --------------------------------------------------------------------------------------------------------

function fill(node, attributes, children = []) {
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child || child === 0));
  return node;
}

const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

const breakable = (name) => name.split(/(?<=[_/.+])/).map((part) => [part, h("wbr")]);  // names wrap at _, /, . and +
const unique = (values) => [...new Set(values)];
const finite = (values) => values.filter(Number.isFinite);
const many = (count, one, more = one + "s") => `${count} ${count === 1 ? one : more}`;
const note = (text) => h("p", { class: "note" }, text);
const stacked = (first, second) => [h("span", null, first), second && h("small", null, second)];
const put = (id, ...content) => fill(document.getElementById(id), null, content);

const ruler = document.createElement("canvas").getContext("2d");

const family = getComputedStyle(document.body).fontFamily;

function textWidth(text, size = 12) {
  ruler.font = `${size}px ${family}`;
  return ruler.measureText(text).width;
}

function shorten(text, width, size = 12) {
  if (textWidth(text, size) <= width) return text;
  let kept = text.length;
  while (kept > 1 && textWidth(text.slice(0, kept) + "…", size) > width) kept -= 1;
  return text.slice(0, kept) + "…";
}

function shortenMiddle(text, width, size = 12) {  // names of runs differ at their ends
  if (textWidth(text, size) <= width) return text;
  let kept = text.length - 1;
  const cut = () => `${text.slice(0, kept >> 2)}…${text.slice(text.length - (kept - (kept >> 2)))}`;
  while (kept > 4 && textWidth(cut(), size) > width) kept -= 1;
  return cut();
}

function saveAs(file, name) {
  const link = h("a", { href: URL.createObjectURL(file), download: name.replace(/[^\w.-]+/g, "_") });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function copyable(text, label) {
  const code = h("code", null, text), button = h("button", { type: "button", onclick: copy }, "Copy");
  async function copy() {
    let done = true;
    try { await navigator.clipboard.writeText(text); } catch {  // not allowed for a page from a file
      getSelection().selectAllChildren(code);
      try { done = document.execCommand("copy"); } catch { done = false; }
    }
    button.textContent = done ? "Copied" : "Selected: press Ctrl+C";
    setTimeout(() => { button.textContent = "Copy"; }, 2500);
  }
  return h("div", { class: "copyable" }, h("pre", { tabindex: 0, "aria-label": label }, code), button);
}

// -- numbers ---------------------------------------------------------------------------------------------------------

const NONE = "–";
const known = (value) => typeof value === "number" && Number.isFinite(value);

function fixed(value, decimals, sign = false) {  // decimals below 0: five significant digits
  if (!known(value)) return NONE;
  if (decimals < 0) return (value < 0 ? "−" : sign && value ? "+" : "") + digits(Math.abs(value), 5);
  const [whole, part] = Math.abs(value).toFixed(decimals).split(".");
  const text = whole.replace(/\B(?=(\d{3})+$)/g, "\u2009") + (part ? "." + part : "");
  const zero = !Number(value.toFixed(decimals));
  return (zero ? "" : value < 0 ? "−" : sign ? "+" : "") + text;
}

function digits(value, count = 3) {  // `count` significant digits, without an exponent if possible
  if (!known(value)) return NONE;
  const size = Math.abs(value);
  if (value && (size >= 1e9 || size < 1e-5)) return value.toExponential(count - 1).replaceAll("-", "−");
  return fixed(value, value ? Math.min(8, Math.max(0, count - 1 - Math.floor(Math.log10(size)))) : 0);
}

function human(value) {
  if (!known(value)) return NONE;
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]]) {
    if (Math.abs(value) >= 0.9995 * size) return Number((value / size).toPrecision(3)) + unit;
  }
  return String(Number(value.toPrecision(3))).replace("-", "−");
}

const fair = (one) => (one?.verdict === "diverges" ? { ...one, mean: null, low: null, high: null } : one);  // survivors are no fair sample
const between = (low, high, show) => (known(low) && known(high) ? `[${show(low)}, ${show(high)}]` : "");
const said = (status) => String(status).replaceAll("_", " ");
const percent = (share) => (known(share) ? `${Math.round(100 * share)}%` : NONE);

function decimalsOf(study) {  // of the metric: two digits of the margin, else of the smallest spread
  const spreads = study.arms.map((arm) => arm.quality?.sd).filter((sd) => sd > 0);
  const means = study.arms.map((arm) => Math.abs(arm.quality?.mean ?? 0)), largest = Math.max(0, ...means);
  if (largest >= 1e6 || (largest > 0 && largest < 0.01 && !(study.metric.margin >= 1e-5))) return -1;
  const scale = study.metric.margin || Math.min(...spreads, 0.05);
  return Math.min(6, Math.max(1, 1 - Math.floor(Math.log10(scale))));
}

// -- which arms are picked, and how they look ------------------------------------------------------------------------

const MANY = 24;  // arms; of more, the legend shows those that are picked
const COLORS = 7, DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]];
const looks = new Map();  // arm -> slot; an arm looks the same in every study
const redraws = new Set();  // charts to redraw when picks, colours or widths change
const refreshes = new Set();  // what shows the payload, to be called when it has changed
const hotWatchers = new Set();
let hot = null;

const everyArm = () => unique(payload.studies.flatMap((study) => study.arms.map((arm) => arm.name)));

function setPicks(arms) {
  looks.clear();
  arms.forEach((arm, slot) => looks.set(arm, slot));
  looksChanged();
}

function togglePick(arm) {
  const used = new Set(looks.values());
  let slot = 0;
  while (used.has(slot)) slot += 1;
  if (!looks.delete(arm)) looks.set(arm, slot);
  looksChanged();
}

const colorOf = (slot) => `var(--c${slot % COLORS})`;
const dashOf = (arm) => DASHES[Math.floor((looks.get(arm) ?? 0) / COLORS) % DASHES.length];

const SHAPES = [  // around the origin, of similar area
  "M5 0A5 5 0 1 1 -5 0A5 5 0 1 1 5 0Z", "M-4.5 -4.5H4.5V4.5H-4.5Z", "M0 -6.3L6.3 0L0 6.3L-6.3 0Z",
  "M0 -6L6 4.6H-6Z", "M0 6L6 -4.6H-6Z", "M-2 -6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
];

function shapeOf(arm) {
  const slot = looks.get(arm) ?? 0;
  return SHAPES[(slot + Math.floor(slot / COLORS)) % SHAPES.length];
}

function swatch(arm) {
  const box = { width: 34, height: 14, viewBox: "-17 -7 34 14" };
  return s("svg", { class: "swatch", "aria-hidden": "true", "data-swatch": arm, ...box },
    s("path", { d: "M-17 0H17", class: "line" }), s("path", { class: "dot" }));
}

function paint(root) {  // the look of every element that belongs to an arm
  for (const node of root.querySelectorAll("[data-arm]")) {
    const slot = looks.get(node.dataset.arm);
    node.style.setProperty("--look", slot === undefined ? "var(--faint)" : colorOf(slot));
    node.classList.toggle("picked", slot !== undefined);
    if (node.hasAttribute("aria-pressed")) node.setAttribute("aria-pressed", String(slot !== undefined));
  }
  for (const box of root.querySelectorAll("input[data-pick]")) box.checked = looks.has(box.dataset.pick);
  for (const one of root.querySelectorAll("[data-swatch]")) {
    one.firstChild.setAttribute("stroke-dasharray", dashOf(one.dataset.swatch).map((gap) => gap * 0.7).join(" ") || "none");
    one.lastChild.setAttribute("d", shapeOf(one.dataset.swatch));
  }
}

function looksChanged() {
  paint(document);
  for (const redraw of redraws) redraw();
}

function setHot(arm) {
  if (arm === hot) return;
  hot = arm;
  for (const node of document.querySelectorAll("[data-arm]")) node.classList.toggle("hot", node.dataset.arm === arm);
  document.body.classList.toggle("some-hot", arm !== null);
  for (const watch of hotWatchers) watch();
}

function legend(arms) {
  const chips = arms.map((name) => h("button",
    { type: "button", class: "chip", "data-arm": name, "data-pick": name, "aria-pressed": "false" }, swatch(name), name));
  const preset = (text, arms) => h("button", { type: "button", onclick: () => setPicks(arms()) }, text);
  return h("div", { class: `legend${chips.length > MANY ? " long" : ""}`, role: "group", "aria-label": "arms in the charts" },
    h("span", { class: "presets" }, "In colour:",
      preset("suggested", firstPicks), preset("all", everyArm), preset("none", () => [])), chips);
}

// -- the read-out at the pointer -------------------------------------------------------------------------------------

const tipBox = document.getElementById("tip");
const tipLines = ([first, ...rest]) => [h("strong", null, first), rest.map((line) => h("div", null, line))];

function showTip(content, x, y) {  // beside x, below y
  tipBox.replaceChildren();
  paint(fill(tipBox, null, [content]));
  tipBox.hidden = false;
  const { offsetWidth: width, offsetHeight: height } = tipBox;
  const left = x + 16 + width > innerWidth - 8 ? x - 16 - width : x + 16;
  tipBox.style.left = `${Math.max(8, left)}px`;
  tipBox.style.top = `${Math.max(8, Math.min(y, innerHeight - height - 8))}px`;
}

function hideTip() {
  tipBox.hidden = true;
  for (const one of document.querySelectorAll(".crosshair")) one.replaceChildren();
}

function pointAt(event) {
  const node = event.target.closest?.("[data-arm]");
  if (!event.target.closest?.(".curves")) setHot(node?.dataset.arm ?? null);
  const teller = event.target.closest?.("[data-tip]");
  if (teller && event.type === "pointerover") showTip(tipLines(teller.dataset.tip.split("\n")), event.clientX, event.clientY + 14);
  else if (!event.target.closest?.(".curves")) hideTip();
}

document.addEventListener("pointerover", pointAt);
document.addEventListener("focusin", pointAt);
document.documentElement.addEventListener("pointerleave", (event) => {  // a lifted finger leaves its reading
  if (event.pointerType === "mouse") { setHot(null); hideTip(); }
});
document.addEventListener("scroll", hideTip, { passive: true });
document.addEventListener("click", (event) => {
  const node = event.target.closest("[data-pick]");
  if (node && !event.target.closest("a, button:not([data-pick])") && !String(getSelection())) togglePick(node.dataset.pick);
});
