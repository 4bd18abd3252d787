// Curves over steps: on a canvas, as there may be 500 of 300 points, between two drawings: axes below, marks above.
// A crosshair reads the picked arms' values at a step; a run that leaves through the top is marked there.
//
// A chart is {title, text, none, kinds}; a kind is {label, keys, axis, late, range}: the keys of the curves that it shows,
// the name of its axis, whether the steep start of a loss is left out of the frame, and options of `limits`.

const MOST_READ = 24, MOST_NAMED = 12;  // rows of a reading; names of runs that ended early
const SMOOTHED = 0.04, FEWEST_SMOOTHED = 20;  // share of points under one window; curves with fewer points are not smoothed
const NOISY = ["train", "grad_norm"], MOST_DOTTED = 60;  // what is smoothed; points that are drawn as such

const WHAT = { train: "training", val: "validation" };

const LOSSES = {
  title: "Loss curves", none: "No run has logged a finite loss yet.",
  text: "Thin: single runs. Thick: the mean of an arm's completed runs, smoothed for training losses. Grey: arms that are not "
    + "selected. Cross: a run diverged; triangle: one left the frame. Point, touch or press ← and → to read values; drag, pinch or "
    + "Ctrl + wheel to zoom, double-click to reset.",
  kinds: [{ label: "validation", keys: ["val"], axis: "validation loss", late: true },
    { label: "training", keys: ["train"], axis: "training loss", late: true }],
};

function lossesOf(study) {  // of runs trained elsewhere the curves are of the metric that judges them
  if (!study.elsewhere) return LOSSES;
  const [own, training] = LOSSES.kinds, { key, label, better } = study.metric;
  return { ...LOSSES, title: "Curves", none: `The logs hold no curve of ${label}.`, kinds: [{ ...own, label: key, axis: label, late: better === "lower" }, training] };
}

function smooth(values) {  // as `gptlab plot` does: a mean with Hann weights, over fewer points towards the ends
  const half = Math.max(2, Math.round((SMOOTHED * values.length) / 2));
  return values.map((value, i) => {
    const reach = Math.min(half, i);
    let sum = 0, weights = 0;
    for (let j = i - reach; j <= Math.min(values.length - 1, i + reach); j += 1) {
      const weight = values[j] === null ? 0 : 0.5 + 0.5 * Math.cos((Math.PI * (j - i)) / (reach + 1));
      sum += weight * values[j];
      weights += weight;
    }
    return value === null ? null : sum / weights;
  });
}

function exploded(losses) {  // it ends a quarter above its lowest loss and has lost half of what it had gained
  const logged = finite(losses), low = logged.reduce((a, b) => Math.min(a, b), Infinity);
  return logged.length > 1 && logged.at(-1) > Math.max(1.25 * low, (logged[0] + low) / 2);
}

function nearest(curve, step) {  // the index of the logged loss nearest to a step, -1 without any
  let before = bisect(curve.x, step) - 1, after = before + 1;
  while (before >= 0 && curve.y[before] === null) before -= 1;
  while (after < curve.x.length && curve.y[after] === null) after += 1;
  if (after >= curve.x.length) return before;
  if (before < 0) return after;
  return step - curve.x[before] <= curve.x[after] - step ? before : after;
}

function gather(study, { keys, late, range }) {  // the curves of a kind, and the limits that show them
  const curve = (source, key, more) => ({ ...more, key, x: source[key]?.[0] ?? [], y: source[key]?.[1] ?? [] });
  const look = (run) => ({ arm: run.arm, seed: run.seed, status: run.status, ended: run.ended });
  const seeds = keys.flatMap((key) => study.runs.map((run) => curve(run, key, look(run))));
  const means = keys.flatMap((key) => Object.entries(study.means).map(([arm, mean]) => curve(mean, key, { arm, mean: true })));
  for (const mean of means.filter((one) => NOISY.includes(one.key) && one.y.length >= FEWEST_SMOOTHED)) {
    Object.assign(mean, { logged: mean.y, y: smooth(mean.y) });
  }
  const curves = [...seeds, ...means].filter((one) => one.x.length || one.status === "diverged");
  const steps = curves.flatMap((one) => [one.x[0], one.x.at(-1), one.ended]).filter(known);
  const first = Math.min(...steps), last = Math.max(...steps, first + 1);
  for (const one of curves) one.exploded = Boolean(late) && exploded(one.y);
  const calm = curves.filter((one) => one.status === "completed" && !one.exploded), done = calm.length ? calm : curves;
  const start = late && done.some((one) => one.x.length > 4) ? first + 0.15 * (last - first) : first;  // the steep start is left out
  const until = (one) => (calm.length || !late ? Infinity : one.x[one.y.indexOf(Math.min(...finite(one.y)))]);  // the rise is left out too
  const shown = finite(done.flatMap((one) => { const end = until(one); return one.y.filter((_, i) => one.x[i] >= start && one.x[i] <= end); }));
  const values = shown.length ? shown : finite(curves.flatMap((one) => one.y));
  const [low, high] = limits(values, range), least = values.reduce((a, b) => Math.min(a, b), Infinity);
  return { curves, whole: { x: [first, last], y: [least > 0 ? Math.max(low, least / 2) : low, high] } };
}

const logged = (study, key) => study.runs.some((run) => run[key]?.[1].some(known));

function curveChart(study, { title, text, none, kinds: all }) {
  const kinds = all.filter((one) => one.keys.every((key) => logged(study, key)));
  if (!kinds.length) return figure(title, none);

  let kind = kinds[0], log = false, view = null, x, y, area;
  let { curves, whole } = gather(study, kind);
  const canvas = h("canvas", { "aria-hidden": "true" }), under = h("div"), over = h("div");
  let steps = null, read = [], at = null;  // steps that the crosshair stops at, curves that it reads, the step it is at
  const crosshair = s("g", { class: "crosshair" }), band = s("rect", { class: "band" });
  const heard = h("p", { class: "unseen", role: "status" });
  const box = h("div", { class: "plot curves", tabindex: 0, role: "group", "aria-label": `${title} of ${
    many(study.runs.length, "run")}. Left and right read the values step by step; plus and minus zoom, up and down move, 0 shows all.` },
  under, canvas, over, heard);
  const redraw = responsive(box, draw);
  const reset = h("button", { type: "button", class: "reset", disabled: true, onclick: () => zoomTo(null) }, "Reset zoom");

  function draw(width) {
    const height = width < 480 ? 300 : within(0.42 * width, 320, 460), now = view ?? whole;
    area = plotArea(width, height);
    x = scale(...now.x, area.left, area.right);
    y = scale(...now.y, area.bottom, area.top, log && now.y[0] > 0);
    box.style.aspectRatio = `${width} / ${height}`;  // sizes inside are percentages: paper may be narrower
    const share = (part, all) => `${(100 * part) / all}%`;
    Object.assign(canvas.style, { left: share(area.left, width), top: share(area.top, height),
      width: share(area.width, width), height: share(area.height, height) });
    under.replaceChildren(drawing(width, height));
    over.replaceChildren(drawing(width, height, marks(), crosshair, band));
    axes(under.firstChild, area, x, y, "step", `${kind.axis}${y.log ? ", logarithmic" : ""}`);
    crosshair.replaceChildren();
    steps = null;
    paint(over);
    paintCurves();
  }

  const nameOf = (one) => one.arm + (one.mean || !known(one.seed) ? "" : `, seed ${one.seed}`);

  function ending(curve) {  // where a run diverged, or left through the top of the frame and stayed out; null if it did neither
    const last = curve.y.findLastIndex((loss) => loss !== null), diverged = curve.status === "diverged";
    const above = (i) => curve.y[i] === null || curve.y[i] > y.high, out = last < 0 || above(last);
    if (curve.mean || curve.key !== kind.keys[0] || (!diverged && !(out && last >= 0 && (curve.exploded || !view)))) return null;
    let left = last;
    while (left > 0 && above(left - 1)) left -= 1;
    const step = curve.ended ?? curve.x[left > 0 ? left : last] ?? 0;  // one that was never inside is marked at its end
    if (step < x.low || step > x.high) return null;
    const one = kind.late ? "loss" : "value", lines = [nameOf(curve),
      `${diverged ? "diverged at" : `${left > 0 ? "left" : "is above"} the frame at`} step ${fixed(step, 0)}`,
      last < 0 ? `no finite ${one} logged` : `last finite ${one} ${digits(curve.y[last], 4)} at step ${fixed(curve.x[last], 0)}`];
    const py = out ? area.top + 8 : within(y(curve.y[last]), area.top, area.bottom);
    return { arm: curve.arm, step, out, lines, px: x(step), py };
  }

  function marks() {  // a cross where a run ended, an arrow where it left the frame; one name for those side by side
    const all = curves.map(ending).filter(Boolean).sort((a, b) => looks.has(b.arm) - looks.has(a.arm) || a.step - b.step);
    const taken = all.map(({ px, py }) => [px - 7, py - 7, px + 7, py + 7]), groups = [];
    for (const one of all) {
      const group = groups.find(([first]) => first.arm === one.arm && Math.abs(first.px - one.px) < 40);
      if (group) group.push(one); else groups.push([one]);
    }
    const shape = (out, px, py) => (out ? `M${px} ${py - 8}l6 12h-12Z` : `M${px - 5} ${py - 5}l10 10m0 -10l-10 10`);
    const shapes = all.map(({ arm, out, lines, px, py }) => s("g", { "data-arm": arm, "data-tip": lines.join("\n") },
      s("path", { class: out ? "leaves" : "cross", d: shape(out, px, py) }), s("circle", { class: "reach", cx: px, cy: py, r: 8 })));
    const names = groups.slice(0, MOST_NAMED).map(([{ arm, step, px, py }, ...more]) => {
      const text = `${shorten(arm, area.width * 0.45, 11.5)}, step ${fixed(step, 0)}${more.length ? `, ${more.length + 1} runs` : ""}`;
      return placeLabel(arm, text, px, py, area, taken);
    });
    return [shapes, names];
  }

  function paintCurves() {
    const ratio = Math.max(2, devicePixelRatio || 1), style = getComputedStyle(document.documentElement);
    const colors = Array.from({ length: COLORS }, (_, i) => style.getPropertyValue(`--c${i}`));
    const picked = curves.filter((one) => looks.has(one.arm) && !one.mean).length, thin = within(8 / picked, 0.12, 0.45);
    canvas.width = area.width * ratio;
    canvas.height = area.height * ratio;
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, -area.left * ratio, -area.top * ratio);
    pen.lineJoin = "round";
    const layer = (one) => (one.arm === hot ? 4 : looks.has(one.arm) ? 2 : 0) + (one.mean ? 1 : 0);
    for (const one of [...curves].sort((a, b) => layer(a) - layer(b))) {
      const at = layer(one), slot = looks.get(one.arm);
      if (at === 1) continue;  // the mean of an arm that is not picked
      pen.strokeStyle = slot !== undefined ? colors[slot % COLORS] : style.getPropertyValue(at > 3 ? "--ink" : "--faint");
      pen.globalAlpha = [0.5, 0, thin, 1, 0.8, 1][at] * (hot !== null && at < 4 ? 0.2 : 1);
      pen.lineWidth = [0.8, 0, 1, one.logged && kind.keys.length > 1 ? 1.4 : 2.1, 1.1, 3][at];
      pen.setLineDash(one.mean ? dashOf(one.arm) : []);
      pen.beginPath();
      for (let i = 0, on = false; i < one.x.length && !(one.x[i - 1] > x.high); i += 1) {
        if (one.x[i + 1] < x.low) continue;
        if (one.y[i] === null || (y.log && one.y[i] <= 0)) on = false;
        else if (on) pen.lineTo(x(one.x[i]), within(y(one.y[i]), -1e4, 1e4));
        else { pen.moveTo(x(one.x[i]), within(y(one.y[i]), -1e4, 1e4)); on = true; }
      }
      pen.stroke();
      if (one.mean && kind.keys.length > 1 && !NOISY.includes(one.key) && one.x.length <= MOST_DOTTED) dots(pen, one);
    }
  }

  function dots(pen, one) {
    pen.fillStyle = pen.strokeStyle;
    for (const [i, value] of one.y.entries()) {
      if (value === null) continue;
      pen.beginPath();
      pen.arc(x(one.x[i]), within(y(value), -1e4, 1e4), 3, 0, 7);
      pen.fill();
    }
  }
  hotWatchers.add(() => { if (area) paintCurves(); });

  function stops() {  // of the crosshair: the steps of the curves that it reads; found anew after each drawing
    const averaged = new Set(curves.filter((one) => one.mean).map((one) => one.arm));
    read = curves.filter((one) => looks.has(one.arm) && Boolean(one.mean) === averaged.has(one.arm) && one.y.some(known));
    return unique((read.length ? read : curves).flatMap((one) => one.x)).sort((a, b) => a - b);
  }

  function readOut(event) {
    const [px, py] = local(event), mark = event.target.closest?.("[data-tip]");
    const inside = (steps ??= stops()).filter((step) => step >= x.low && step <= x.high);
    setHot(mark?.dataset.arm ?? null);
    if (mark || !inside.length) { crosshair.replaceChildren(); return; }
    const step = inside.reduce((a, b) => (Math.abs(x(b) - px) < Math.abs(x(a) - px) ? b : a));
    let pointed = null, least = 10;  // pixels: the curve under the pointer is read too, be it a single seed's or a grey one
    for (const one of curves.filter((curve) => (curve.mean ? looks.has(curve.arm) : !study.single))) {
      const i = nearest(one, step), away = i < 0 ? NaN : Math.hypot(y(one.y[i]) - py, (x(one.x[i]) - px) / 6);
      if (away < least) [pointed, least] = [one, away];
    }
    readAt(step, pointed);
  }

  function readAt(step, pointed) {  // a line at the step, and every picked arm's loss logged nearest to it
    at = step;
    const shown = unique([...read, pointed].filter(Boolean)).map((one) => ({ one, i: nearest(one, step) })).filter(({ i }) => i >= 0)
      .map(({ one, i }) => ({ one, there: one.x[i], loss: one.y[i], value: digits((one.logged ?? one.y)[i], 5) }))
      .sort((a, b) => b.loss - a.loss);  // as they lie in the plot
    const first = within(shown.findIndex(({ one }) => one === pointed) - MOST_READ / 2, 0, Math.max(0, shown.length - MOST_READ));
    const rows = shown.slice(first, first + MOST_READ), left = shown.length - rows.length;
    const seen = rows.filter(({ there, loss }) => there >= x.low && there <= x.high && loss >= y.low && loss <= y.high);
    crosshair.replaceChildren(line("", x(step), area.top, x(step), area.bottom), ...seen.map(({ one, there, loss }) =>
      s("circle", { class: "here", "data-arm": one.arm, cx: x(there), cy: y(loss), r: 3.5 })));
    paint(crosshair);
    const aside = (one, there, loss) => h("td", null, h("small", null, [kind.keys.length > 1 && WHAT[one.key],
      one.logged && `smoothed ${digits(loss, 4)}`, there !== step && `at step ${fixed(there, 0)}`].filter(Boolean).join(", ")));
    const table = h("table", { class: study.single && "brief" }, rows.map(({ one, there, loss, value }) => h("tr", { "data-arm": one.arm, class: one === pointed && "pointed" },
      h("td", null, swatch(one.arm)), h("td", null, study.single ? shortenMiddle(nameOf(one), 190) : nameOf(one)), h("td", { class: "number" }, value), aside(one, there, loss))));
    heard.textContent = [`step ${fixed(step, 0)}`, ...rows.map(({ one, value }) => `${nameOf(one)} ${value}`)].join(", ");
    showReading([h("strong", null, `step ${fixed(step, 0)}`), table, left > 0 && h("small", null, `${many(left, "curve")} more`)]);
  }

  function showReading(content) {  // beside the line; on a phone above or below the plot
    const edge = box.getBoundingClientRect(), px = edge.left + x(at);
    showTip(content, px, edge.top + area.top);
    if (edge.width >= 480) return;
    const over = edge.top - tipBox.offsetHeight - 4;
    tipBox.style.left = `${edge.left}px`;
    tipBox.style.top = `${over > 8 ? over : Math.min(edge.bottom - 20, innerHeight - tipBox.offsetHeight - 8)}px`;
  }

  function stepBy(count) {  // the crosshair, from where it is or from the middle; the view follows
    if (at === null || at < x.low || at > x.high) at = x.back((area.left + area.right) / 2);
    steps ??= stops();
    if (!steps.length) return;
    const next = steps[within(bisect(steps, at) + count, 0, steps.length - 1)];
    if (next < x.low || next > x.high) zoomBy(1, [0, 0], x(next) - (area.left + area.right) / 2);
    readAt(next);
  }

  function zoomTo(next) {
    if (next && next.x[1] - next.x[0] < 2) return;  // an axis of steps needs two whole ones
    hideTip();
    view = next;
    reset.disabled = !view;
    redraw();
  }

  function zoomBy(factor, [px, py], shiftX = 0, shiftY = 0) {
    const about = (map, pixel, shift, ...ends) => ends.map((end) => map.back(pixel + (end - pixel) * factor + shift));
    const next = { x: about(x, px, shiftX, area.left, area.right), y: about(y, py, shiftY, area.bottom, area.top) };
    if (factor > 1 && next.x[1] - next.x[0] > whole.x[1] - whole.x[0]) zoomTo(null);
    else if (next.x[1] > next.x[0] && next.y[1] > next.y[0]) zoomTo(next);
  }

  function rectangle(from, to) {  // in pixels: left, right, top, bottom; a nearly flat one spans the whole height
    const order = (a, b) => [Math.min(a, b), Math.max(a, b)], flat = Math.abs(from[1] - to[1]) < 12;
    return [...order(from[0], to[0]), ...(flat ? [area.top, area.bottom] : order(from[1], to[1]))];
  }

  const held = new Map();  // pointers that are down -> position
  let start = null, spread = 0;
  const local = (event) => {
    const edge = box.getBoundingClientRect();
    return [within(event.clientX - edge.left, area.left, area.right), within(event.clientY - edge.top, area.top, area.bottom)];
  };
  const twoApart = () => { const [a, b] = held.values(); return Math.hypot(a[0] - b[0], a[1] - b[1]); };
  const handlers = {
    pointerdown(event) {
      held.set(event.pointerId, local(event));
      if (held.size === 2) spread = twoApart();
      else if (event.pointerType !== "mouse") readOut(event);
      else if (event.button === 0) { start = local(event); box.setPointerCapture(event.pointerId); }
    },
    pointermove(event) {
      if (held.has(event.pointerId)) held.set(event.pointerId, local(event));
      if (held.size === 2) {
        const [a, b] = held.values(), now = Math.max(10, twoApart());
        zoomBy(Math.max(10, spread) / now, [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2]);
        spread = now;
      } else if (start) {
        const [left, right, top, bottom] = rectangle(start, local(event));
        fill(band, { x: left, y: top, width: right - left, height: bottom - top });
      } else readOut(event);
    },
    pointerup(event) {
      const [left, right, top, bottom] = start ? rectangle(start, local(event)) : [];
      handlers.pointercancel(event);
      if (right - left > 6) zoomTo({ x: [x.back(left), x.back(right)], y: [y.back(bottom), y.back(top)] });
    },
    pointercancel(event) {
      held.delete(event.pointerId);
      start = null;
      band.setAttribute("width", 0);
    },
    pointerleave(event) { if (!start && event.pointerType === "mouse") { setHot(null); hideTip(); } },
    dblclick() { zoomTo(null); },
    wheel(event) {  // without Ctrl it scrolls the page, unless the chart has the focus
      if (!event.ctrlKey && !event.metaKey && document.activeElement !== box) return;
      event.preventDefault();
      zoomBy(Math.exp(within(event.deltaY / 300, -1, 1)), local(event));
    },
    keydown(event) {
      const middle = [(area.left + area.right) / 2, (area.top + area.bottom) / 2], far = { ArrowUp: -0.15, ArrowDown: 0.15 }[event.key];
      const many = event.shiftKey ? 10 : 1, stride = { ArrowLeft: -many, ArrowRight: many, Home: -Infinity, End: Infinity }[event.key];
      if (event.key === "+" || event.key === "=") zoomBy(0.7, middle);
      else if (event.key === "-") zoomBy(1 / 0.7, middle);
      else if (event.key === "0" || event.key === "Escape") zoomTo(null);
      else if (stride) stepBy(stride);
      else if (far && view) zoomBy(1, middle, 0, far * area.height);
      else return;
      event.preventDefault();
    },
  };
  for (const [type, handler] of Object.entries(handlers)) box.addEventListener(type, handler, { passive: false });

  const choose = (value) => { kind = value; ({ curves, whole } = gather(study, kind)); zoomTo(null); };
  refreshes.add(() => {  // the zoom stays, and what is read is read anew
    const reading = crosshair.childNodes.length > 0;
    ({ curves, whole } = gather(study, kind));
    redraw();
    if (reading) readAt(at);
  });
  const tools = [kinds.length > 1 ? choices("which curves", kinds.map((one) => [one, one.label]), choose) : null,
    choices("scale", [[false, "linear"], [true, "log"]], (value) => { log = value; redraw(); }), reset];
  return figure(title, text, tools, box);
}

function bisect(sorted, value) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1; else high = middle;
  }
  return low;
}

