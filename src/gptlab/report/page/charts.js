// The charts. Each is a function of a study that returns a figure; it draws itself when its width or the picks change.

function figure(title, text, tools, ...parts) {
  const head = h("div", null, h("h4", null, title), text && note(text));
  return h("figure", { class: "chart" }, h("figcaption", null, head, tools), parts);
}

function responsive(box, draw) {
  let width = 0;
  const redraw = () => { if (width) draw(width); };
  redraws.add(redraw);
  new ResizeObserver(() => {
    if (box.clientWidth === width || !box.clientWidth) return;
    width = box.clientWidth;
    redraw();
  }).observe(box);
  return redraw;
}

function choices(label, options, choose) {  // a row of buttons; one is pressed, first the first
  const buttons = options.map(([value, text], i) => h("button", { type: "button", "aria-pressed": String(!i), onclick() {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button === this));
    choose(value);
  } }, text));
  return h("div", { class: "choices", role: "group", "aria-label": label }, buttons);
}

// -- scales and axes -------------------------------------------------------------------------------------------------

const within = (value, low, high) => Math.min(high, Math.max(low, value));
const write = (kind, x, y, text, anchor = "start") => s("text", { class: kind, x, y, "text-anchor": anchor }, text);
const line = (kind, x1, y1, x2, y2) => s("line", { class: kind, x1, y1, x2, y2 });
const drawing = (width, height, ...more) => s("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, more);

function scale(low, high, from, to, log = false) {  // from values to pixels, and back
  const put = log ? Math.log : (value) => value, a = put(low), b = put(high);
  const map = (value) => from + ((put(value) - a) / (b - a)) * (to - from);
  const back = (pixel) => (log ? Math.exp : (value) => value)(a + ((pixel - from) / (to - from)) * (b - a));
  return Object.assign(map, { low, high, log, back });
}

function ticks(low, high, most, log = false, whole = false) {
  if (log) {
    const powers = Array.from({ length: 40 }, (_, i) => 10 ** (i - 20));
    const all = powers.flatMap((power) => [1, 2, 5].map((factor) => factor * power)).filter((one) => one >= low && one <= high);
    if (all.length > 3) return { all: all.length > 2 * most ? all.filter((one) => powers.includes(one)) : all, show: human };
  }
  const rough = Math.max(whole ? 1 : 0, (high - low) / Math.max(1, most)), power = 10 ** Math.floor(Math.log10(rough));
  const factor = [1, 2, whole ? 2 : 2.5, 5, 10].find((one) => one * power >= rough * 0.999), step = factor * power;
  const first = Math.ceil(low / step - 1e-9), count = Math.floor(high / step + 1e-9) - first + 1;
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (factor === 2.5 ? 1 : 0));
  const show = (value) => (Math.abs(value) >= 1e4 || step >= 1000 ? human(value) : fixed(value, decimals));
  return { all: Array.from({ length: count }, (_, i) => (first + i) * step), show };
}

function limits(values, room = 0.06, all = false) {  // of an axis; far outliers are left out
  const sorted = finite(values).sort((a, b) => a - b), at = (share) => sorted[Math.round(share * (sorted.length - 1))];
  if (!sorted.length) return [0, 1];
  const fence = sorted.length > 5 && !all ? 4 * (at(0.75) - at(0.25)) || Infinity : Infinity;
  const kept = sorted.filter((value) => value >= at(0.25) - fence && value <= at(0.75) + fence);
  const low = kept[0], high = kept.at(-1), pad = (high - low || Math.abs(high) * 0.1 || 1) * room;
  return [low - pad, high + pad];
}

function plotArea(width, height) {
  const area = { left: width < 480 ? 44 : 52, right: width - 10, top: 26, bottom: height - 40 };
  return Object.assign(area, { width: area.right - area.left, height: area.bottom - area.top });
}

function axes(svg, area, x, y, xName, yName) {
  const up = ticks(y.low, y.high, area.height / 45, y.log), across = ticks(x.low, x.high, area.width / 60, false, xName === "step");
  for (const value of up.all) {
    svg.append(line("grid", area.left, y(value), area.right, y(value)), write("", area.left - 8, y(value) + 4, up.show(value), "end"));
  }
  for (const value of across.all) {
    svg.append(line("axis", x(value), area.bottom, x(value), area.bottom + 4),
      write("", x(value), area.bottom + 17, across.show(value), "middle"));
  }
  svg.append(line("axis", area.left, area.bottom, area.right, area.bottom),
    write("", area.right, area.bottom + 34, xName, "end"), write("", area.left, 12, yName));
}

// -- loss curves: on a canvas, as there may be 500 of 300 points, between two drawings: axes below, marks above -------

const SMOOTHED = 0.04, FEWEST_SMOOTHED = 20;  // share of points under one window; curves with fewer points are not smoothed

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

function gather(study, kind) {  // the curves of one kind, and the limits that show them
  const curve = (source, more) => ({ ...more, x: source[kind]?.[0] ?? [], y: source[kind]?.[1] ?? [] });
  const seeds = study.runs.map((run) => curve(run, { arm: run.arm, seed: run.seed, status: run.status, ended: run.ended }));
  const means = Object.entries(study.means).map(([arm, mean]) => curve(mean, { arm, mean: true }));
  for (const mean of means) if (kind === "train" && mean.y.length >= FEWEST_SMOOTHED) mean.y = smooth(mean.y);
  const curves = [...seeds, ...means].filter((one) => one.x.length || one.status === "diverged");
  const steps = curves.flatMap((one) => [one.x[0], one.x.at(-1), one.ended]).filter(known);
  const first = Math.min(...steps), last = Math.max(...steps, first + 1);
  const done = curves.some((one) => one.status === "completed") ? curves.filter((one) => one.status === "completed") : curves;
  const start = done.some((one) => one.x.length > 4) ? first + 0.15 * (last - first) : first;  // the steep start is left out
  const late = finite(done.flatMap((one) => one.y.filter((_, i) => one.x[i] >= start)));
  const losses = late.length ? late : finite(curves.flatMap((one) => one.y));
  const [low, high] = limits(losses), least = losses.reduce((a, b) => Math.min(a, b), Infinity);
  return { curves, whole: { x: [first, last], y: [least > 0 ? Math.max(low, least / 2) : low, high] } };
}

function curveChart(study) {
  const kinds = [["val", "validation"], ["train", "training"]].filter(([kind]) => study.runs.some((run) => run[kind][1].some(known)));
  if (!kinds.length) return figure("Loss curves", "No run has logged a finite loss yet.");

  let kind = kinds[0][0], log = false, view = null, x, y, area;
  let { curves, whole } = gather(study, kind);
  const canvas = h("canvas", { "aria-hidden": "true" }), under = h("div"), over = h("div");
  const dot = s("circle", { class: "here", r: 4, visibility: "hidden" }), band = s("rect", { class: "band" });
  const box = h("div", { class: "plot curves", tabindex: 0, role: "group", "aria-label": `Loss curves of ${
    many(study.runs.length, "run")}. Plus and minus zoom, arrow keys move, 0 shows all.` }, under, canvas, over);
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
    over.replaceChildren(drawing(width, height, curves.filter((one) => one.status === "diverged").map(cross), dot, band));
    axes(under.firstChild, area, x, y, "step", `${kinds.find(([one]) => one === kind)[1]} loss${y.log ? ", logarithmic" : ""}`);
    dot.setAttribute("visibility", "hidden");
    paint(over);
    paintCurves();
  }

  function cross(curve) {  // where a diverged run ended, at its last finite loss
    const i = curve.y.findLastIndex((loss) => loss !== null), step = curve.ended ?? curve.x[i] ?? 0;
    const px = x(step), py = i < 0 ? area.top : within(y(curve.y[i]), area.top, area.bottom);
    if (step < x.low || step > x.high) return null;
    const loss = i < 0 ? "no finite loss logged" : `last finite loss ${digits(curve.y[i], 4)} at step ${fixed(curve.x[i], 0)}`;
    const tip = `${curve.arm}, seed ${curve.seed}\ndiverged at step ${fixed(step, 0)}\n${loss}`;
    return s("g", { "data-arm": curve.arm, "data-tip": tip },
      s("path", { class: "cross", d: `M${px - 5} ${py - 5}l10 10m0 -10l-10 10` }));
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
      pen.lineWidth = [0.8, 0, 1, 2.1, 1.1, 3][at];
      pen.setLineDash(one.mean ? dashOf(one.arm) : []);
      pen.beginPath();
      for (let i = 0, on = false; i < one.x.length && !(one.x[i - 1] > x.high); i += 1) {
        if (one.x[i + 1] < x.low) continue;
        if (one.y[i] === null || (y.log && one.y[i] <= 0)) on = false;
        else if (on) pen.lineTo(x(one.x[i]), within(y(one.y[i]), -1e4, 1e4));
        else { pen.moveTo(x(one.x[i]), within(y(one.y[i]), -1e4, 1e4)); on = true; }
      }
      pen.stroke();
    }
  }
  hotWatchers.add(() => { if (area) paintCurves(); });

  function readOut(event) {
    const [px, py] = local(event);
    let best = { away: 60 };  // pixels
    for (const one of curves.filter((curve) => !curve.mean || looks.has(curve.arm))) {
      const at = bisect(one.x, x.back(px));
      for (let i = Math.max(0, at - 4); i < Math.min(one.x.length, at + 4); i += 1) {
        const there = [x(one.x[i]), one.y[i] === null ? NaN : y(one.y[i])];
        const inside = there[0] > area.left - 1 && there[0] < area.right + 1 && there[1] > area.top - 1 && there[1] < area.bottom + 1;
        const away = Math.hypot(there[0] - px, there[1] - py) * (looks.has(one.arm) ? 1 : 2.5);
        if (inside && away < best.away) best = { away, one, there, step: one.x[i], loss: one.y[i] };
      }
    }
    setHot(best.one?.arm ?? null);
    dot.setAttribute("visibility", best.one ? "visible" : "hidden");
    if (!best.one) { hideTip(); return; }
    fill(dot, { cx: best.there[0], cy: best.there[1] });
    const { seed, status, mean } = best.one;
    const which = mean ? "mean of its seeds" + (kind === "train" ? ", smoothed" : "") : `seed ${seed}, ${said(status)}`;
    showTip(event.clientX, event.clientY, `${best.one.arm}\n${which}\nstep ${fixed(best.step, 0)}, loss ${digits(best.loss, 5)}`);
  }

  function zoomTo(next) {
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
      const middle = [(area.left + area.right) / 2, (area.top + area.bottom) / 2], far = [0.15 * area.width, 0.15 * area.height];
      const move = { ArrowLeft: [-far[0], 0], ArrowRight: [far[0], 0], ArrowUp: [0, -far[1]], ArrowDown: [0, far[1]] }[event.key];
      if (event.key === "+" || event.key === "=") zoomBy(0.7, middle);
      else if (event.key === "-") zoomBy(1 / 0.7, middle);
      else if (event.key === "0" || event.key === "Escape") zoomTo(null);
      else if (move && view) zoomBy(1, middle, ...move);
      else return;
      event.preventDefault();
    },
  };
  for (const [type, handler] of Object.entries(handlers)) box.addEventListener(type, handler, { passive: false });

  const choose = (value) => { kind = value; ({ curves, whole } = gather(study, kind)); zoomTo(null); };
  const tools = h("div", { class: "tools" }, kinds.length > 1 ? choices("which loss", kinds, choose) : null,
    choices("scale of the loss", [[false, "linear"], [true, "log"]], (value) => { log = value; redraw(); }), reset);
  return figure("Loss curves", "Thin: single runs. Thick: the mean of an arm's completed runs; means of training losses are smoothed. "
    + "Grey: arms that are not selected. A cross marks where a run diverged. Drag, pinch or Ctrl + wheel to zoom; double-click "
    + "to reset.", tools, box);
}

function bisect(sorted, value) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1; else high = middle;
  }
  return low;
}

// -- quality against throughput or memory, with the frontier ---------------------------------------------------------

function frontier(points, signX, signY) {  // points that no other point beats: as good in both, better in one
  const beats = (a, b) => signX * a.x >= signX * b.x && signY * a.y >= signY * b.y && (a.x !== b.x || a.y !== b.y);
  return points.filter((one) => !points.some((other) => beats(other, one))).sort((a, b) => a.x - b.x || a.y - b.y);
}

function tradeOff(study, title, label, better, of) {
  const points = study.arms.filter((arm) => arm.quality && known(of(arm)?.value)).map((arm) => ({
    arm: arm.name, x: of(arm).value, y: arm.quality.mean, ends: [of(arm).low, of(arm).high],
    spread: [arm.quality.low, arm.quality.high], whole: !arm.statuses.diverged, all: arm }));
  if (points.length < 2) return null;
  const right = better === "higher", up = study.metric.better === "higher", judged = points.filter((one) => one.whole);
  const edge = frontier(judged, right ? 1 : -1, up ? 1 : -1);
  const box = h("div", { class: "plot", role: "img", "aria-label": `${title}. On the frontier: ${
    edge.map((one) => one.arm).join(", ")}. The numbers are in the table.` });

  function told({ arm, whole, x, all }) {
    const lines = [arm, `${study.metric.label}: ${quality(study, all)}`, `${label}: ${digits(x, 4)}`];
    if (!whole) lines.push(`${all.statuses.diverged} of ${all.planned} runs diverged: left out of the frontier`);
    if (known(all.frontier)) lines.push(`on the frontier of throughput and quality in ${percent(all.frontier)} of draws`);
    return lines.join("\n");
  }

  responsive(box, (width) => {
    const height = within(0.7 * width, 300, 400), area = plotArea(width, height), svg = drawing(width, height);
    const shown = judged.length ? judged : points, long = (one) => one.spread[1] - one.spread[0];
    const usual = shown.map(long).sort((a, b) => a - b)[shown.length >> 1];
    const spreads = shown.filter((one) => known(one.spread[0]) && long(one) <= 3 * usual).flatMap((one) => one.spread);
    const x = scale(...limits(points.map((one) => one.x), 0.12, true), area.left, area.right);
    const y = scale(...limits([...shown.map((one) => one.y), ...spreads]), area.bottom, area.top);
    axes(svg, area, x, y, label, study.metric.label);
    svg.append(write("better", right ? area.right - 4 : area.left + 6, up ? area.top + 12 : area.bottom - 8,
      [["↙ better", "↖ better"], ["better ↘", "better ↗"]][+right][+up], right ? "end" : "start"));
    const worse = (a, b, high) => (high ? Math.min(a, b) : Math.max(a, b));
    const corner = (one, last) => (last ? `L${x(worse(one.x, last.x, right))} ${y(worse(one.y, last.y, up))}L` : "M");
    const stair = edge.map((one, i) => `${corner(one, edge[i - 1])}${x(one.x)} ${y(one.y)}`).join("");
    svg.append(s("path", { class: "frontier", d: stair }));

    const taken = [];
    for (const one of points.sort((a, b) => looks.has(a.arm) - looks.has(b.arm))) {
      const px = x(one.x), py = within(y(one.y), area.top, area.bottom), near = px < area.right - 60;
      const bar = (ends, map, low, high, path) => (known(ends[0]) && known(ends[1])
        ? s("path", { class: "error", d: path(...ends.map((end) => within(map(end), low, high))) }) : null);
      const beyond = y(one.y) < area.top ? "↑" : y(one.y) > area.bottom ? "↓" : "";
      svg.append(s("g", { class: "point", "data-arm": one.arm, "data-pick": one.arm, "data-tip": told(one) },
        bar(one.spread, y, area.top, area.bottom, (a, b) => `M${px} ${a}V${b}`),
        bar(one.ends, x, area.left, area.right, (a, b) => `M${a} ${py}H${b}`),
        s("path", { class: one.whole ? "dot" : "dot hollow", d: shapeOf(one.arm), transform: `translate(${px} ${py})` }),
        beyond && write("", px + (near ? 9 : -9), py + 4, `${beyond} ${fixed(one.y, decimalsOf(study))}`, near ? "start" : "end"),
        s("circle", { class: "reach", cx: px, cy: py, r: 12 })));
      taken.push([px - 7, py - 7, px + 7, py + 7]);
    }
    const weight = (one) => 2 * edge.includes(one) + looks.has(one.arm);
    for (const one of points.filter(weight).sort((a, b) => weight(b) - weight(a))) {
      const text = shorten(one.arm, area.width * 0.5, 11.5);
      const place = freePlace(text, x(one.x), within(y(one.y), area.top, area.bottom), area, taken);
      if (place) svg.append(s("text", { class: "label", "data-arm": one.arm, x: place[0], y: place[1] }, text));
    }
    box.replaceChildren(svg);
    paint(box);
  });
  return figure(title, null, null, box);
}

function freePlace(text, px, py, area, taken) {  // for a label, without covering a mark or a label; null if there is none
  const width = textWidth(text, 11.5), left = -9 - width, middle = -width / 2;
  for (const [dx, dy] of [[9, 4], [left, 4], [middle, -11], [middle, 19], [8, -9], [8, 17], [left, -9], [left, 17]]) {
    const [x0, y0, x1, y1] = [px + dx, py + dy - 10, px + dx + width, py + dy + 2];
    if (x0 < area.left || x1 > area.right || y0 < area.top || y1 > area.bottom) continue;
    if (taken.some((one) => one[0] < x1 && x0 < one[2] && one[1] < y1 && y0 < one[3])) continue;
    taken.push([x0, y0, x1, y1]);
    return [x0, py + dy];
  }
  return null;
}

// -- paired differences: a row for each arm; places are in percent, so that no other width needs another drawing -------

function forest(study, arms) {
  const margin = study.metric.margin ?? 0, d = decimalsOf(study), compared = finite(study.arms.map((arm) => arm.comparison?.mean));
  if (!compared.length) return note("No arm has a seed in common with the baseline yet.");
  const ends = study.arms.flatMap((arm) => [arm.comparison?.mean, arm.comparison?.low, arm.comparison?.high]);
  const [low, high] = limits([-1.4 * margin, 0, 1.4 * margin, ...ends]), inside = (value) => value >= low && value <= high;
  const at = (value) => `${(100 * (within(value, low, high) - low)) / (high - low)}%`;
  const reference = study.arms.find((arm) => arm.name === study.baseline)?.values ?? {};
  const band = { class: "margin", x: at(-margin), width: `${(200 * margin) / (high - low)}%`, height: "100%" };
  const interval = (kind, ...parts) => s("svg", { class: `interval ${kind}`, "aria-hidden": "true" }, parts);

  function row(arm) {
    const one = arm.comparison, reach = finite([one.mean, one.low, one.high]);
    const seeds = Object.keys(arm.values).filter((seed) => known(reference[seed])).map((seed) => arm.values[seed] - reference[seed]);
    return h("div", { class: "forest-row", role: "listitem", "data-arm": arm.name, "data-pick": arm.name },
      h("div", { class: "who" }, swatch(arm.name), h("span", null, breakable(arm.name))),
      interval("", margin > 0 && s("rect", band), line("zero", at(0), 0, at(0), "100%"),
        seeds.filter(inside).map((value) => s("circle", { class: "seed", cx: at(value), cy: "50%", r: 2.5 })),
        known(one.low) ? line("whole", at(one.low), "50%", at(one.high), "50%") : null,
        Math.min(...reach) < low ? s("text", { y: "50%", dy: 4 }, "◂") : null,
        Math.max(...reach) > high ? s("text", { x: "100%", y: "50%", dy: 4, "text-anchor": "end" }, "▸") : null,
        inside(one.mean) && one.mean !== null ? s("circle", { class: "mean", cx: at(one.mean), cy: "50%", r: 5 }) : null),
      h("div", { class: "says" }, badge(shownVerdict(arm)), h("span", null, afterVerdict(shownVerdict(arm), one.text))));
  }

  const tick = ticks(low, high, 5), [left, right] = study.metric.better === "lower" ? ["better", "worse"] : ["worse", "better"];
  const scaled = interval("scale", tick.all.map((value) => [line("axis", at(value), 0, at(value), 5),
    write("", at(value), 18, (value > 0 ? "+" : "") + tick.show(value), "middle")]));
  const ways = interval("scale", s("text", { x: at(0), dx: -10, y: 13, "text-anchor": "end" }, `← ${left}`),
    s("text", { x: at(0), dx: 10, y: 13 }, `${right} →`));
  const edge = (middle) => h("div", { class: "forest-row edge", "aria-hidden": "true" }, h("div"), middle, h("div"));
  const list = h("div", { class: "forest", role: "list", "aria-label": "differences to the baseline" },
    edge(ways), arms.filter((arm) => arm.comparison).map(row), edge(scaled));
  paint(list);
  return list;
}

// -- ranks in several studies side by side ---------------------------------------------------------------------------

function slopeChart({ studies, ranks: all }) {
  const ranks = all.filter((one) => one.ranks.some(known)), last = studies.length - 1, row = 23, top = 40;
  if (!ranks.length) return null;
  const box = h("div", { class: "plot", role: "img", "aria-label": `Ranks of ${many(ranks.length, "arm")} in ${studies.join(" and ")}.`
    + ` Part of a flip: ${ranks.filter((one) => one.flip).map((one) => one.arm).join(", ") || "none"}.` });
  const places = studies.map((_, column) => {  // in order of rank; equal ranks are drawn below each other
    const order = ranks.filter((one) => known(one.ranks[column])).sort((a, b) => a.ranks[column] - b.ranks[column]);
    return new Map(order.map((one, i) => [one, top + row * (i + 0.5)]));
  });

  responsive(box, (width) => {
    const height = top + row * ranks.length + 4, narrow = width < 480, size = narrow ? 11 : 12.5, gap = narrow ? 8 : 14;
    const widest = (texts, more = 0) => Math.max(...texts.map((text) => textWidth(text, size + more)));
    const rankWidth = gap + 3 + widest(ranks.flatMap((one) => one.ranks.map((rank) => String(rank ?? ""))));
    const side = Math.min(width * (narrow ? 0.5 : 0.42), gap + rankWidth + widest(ranks.map((one) => one.arm), 1));
    const end = narrow ? rankWidth : side;  // a phone has room for names on one side only
    const px = (column) => side + ((width - side - end) * column) / Math.max(1, last);
    const anchor = (column) => (column === 0 ? "end" : column === last ? "start" : "middle");
    const svg = drawing(width, height, studies.map((study, column) =>
      write("heading", narrow && column === last ? width : px(column), 16, shorten(study, side, size + 0.7),
        narrow && column === last ? "end" : anchor(column))));
    svg.setAttribute("font-size", size);
    for (const one of ranks.sort((a, b) => a.flip - b.flip)) {
      const tip = [one.arm, ...studies.map((study, i) => `${study}: ${known(one.ranks[i]) ? `rank ${one.ranks[i]}` : "no rank"}`)];
      if (one.flip) tip.push("part of a flip");
      const kind = one.flip ? "slope flip" : "slope";
      svg.append(s("g", { class: kind, "data-arm": one.arm, "data-pick": one.arm, "data-tip": tip.join("\n") },
        studies.map((_, column) => {
          const here = places[column].get(one), next = places[column + 1]?.get(one), sign = column ? 1 : -1;
          if (here === undefined) return null;
          const path = ["path", "reach"].map((kind) => next && line(kind, px(column) + 6, here, px(column + 1) - 6, next));
          if (column > 0 && column < last) return [path, s("circle", { class: "mean", cx: px(column), cy: here, r: 3.5 })];
          const name = shorten(one.arm, side - rankWidth - 2, size + (one.flip ? 0.7 : 0.1));
          return [path, write("", px(column) + sign * (gap - 6), here + 4, String(one.ranks[column]), anchor(column)),
            !(narrow && column) && write("who", px(column) + sign * rankWidth, here + 4, name, anchor(column))];
        })));
    }
    box.replaceChildren(svg);
    paint(box);
  });
  return figure("Ranks side by side", "The best arm is at the top. Bold lines belong to a flip: a pair of arms whose order differs between the studies, by more "
    + "than noise and margin in both.", null, box);
}
