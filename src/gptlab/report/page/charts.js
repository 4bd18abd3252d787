// The charts. Each is a function of a study that returns a figure; it draws itself when its width or the picks change.

function figure(title, text, tools, plot) {
  const head = h("div", null, h("h4", null, title), text && note(text));
  const save = plot && h("button", { type: "button", class: "picture", onclick: () => savePicture(plot, title) }, "Save as PNG");
  return h("figure", { class: "chart" }, h("figcaption", null, head, h("div", { class: "tools" }, tools, save)), plot);
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
  const small = (value) => (Math.abs(value) < step / 2 ? "0" : Number(value.toPrecision(3)).toExponential().replaceAll("-", "−"));
  const show = (value) => (Math.abs(value) >= 1e4 || step >= 1000 ? human(value) : step < 1e-6 ? small(value) : fixed(value, decimals));
  return { all: Array.from({ length: count }, (_, i) => (first + i) * step), show };
}

function limits(values, { room = 0.06, all = false, least = 0 } = {}) {  // of an axis; far outliers are left out unless `all`
  const sorted = finite(values).sort((a, b) => a - b), at = (share) => sorted[Math.round(share * (sorted.length - 1))];
  if (!sorted.length) return [0, 1];
  const fence = sorted.length > 5 && !all ? 4 * (at(0.75) - at(0.25)) || Infinity : Infinity;
  const kept = sorted.filter((value) => value >= at(0.25) - fence && value <= at(0.75) + fence);
  const middle = (kept[0] + kept.at(-1)) / 2, span = Math.max(kept.at(-1) - kept[0], least * Math.abs(middle));
  const half = span / 2 + (span || Math.abs(middle) * 0.1 || 1) * room;
  return [middle - half, middle + half];
}

function plotArea(width, height) {
  const area = { left: width < 480 ? 44 : 52, right: width - 10, top: 26, bottom: height - 40 };
  return Object.assign(area, { width: area.right - area.left, height: area.bottom - area.top });
}

function axes(svg, area, x, y, xName, yName) {
  const up = ticks(y.low, y.high, area.height / 45, y.log), across = ticks(x.low, x.high, area.width / 60, x.log, xName === "step");
  for (const value of up.all) {
    svg.append(line("grid", area.left, y(value), area.right, y(value)), write("", area.left - 8, y(value) + 4, up.show(value), "end"));
  }
  const shown = across.all.map((value) => across.show(value)), far = 6 + Math.max(0, ...shown.map((text) => textWidth(text)));
  const every = across.all.length > 1 ? Math.ceil(far / (x(across.all[1]) - x(across.all[0]))) : 1;
  for (const [i, value] of across.all.entries()) {
    if (i % every) continue;
    svg.append(line("axis", x(value), area.bottom, x(value), area.bottom + 4),
      write("", x(value), area.bottom + 17, shown[i], "middle"));
  }
  svg.append(line("axis", area.left, area.bottom, area.right, area.bottom),
    write("", area.right, area.bottom + 34, xName, "end"), write("", area.left, 12, yName));
}

// -- quality against throughput or memory, with the frontier ---------------------------------------------------------

function frontier(points, signX, signY) {  // points that no other point beats: as good in both, better in one
  const beats = (a, b) => signX * a.x >= signX * b.x && signY * a.y >= signY * b.y && (a.x !== b.x || a.y !== b.y);
  return points.filter((one) => !points.some((other) => beats(other, one))).sort((a, b) => a.x - b.x || a.y - b.y);
}

const RESOURCE = { room: 0.12, all: true, least: 0.05 };  // 5% of the value: what an allocator or a clock adds is less

function tradeOff(study, title, across, upward) {  // an axis is {label, better, of(arm): {value, low, high}, metric}
  const points = study.arms.filter((arm) => known(across.of(arm)?.value) && known(upward.of(arm)?.value)).map((arm) => {
    const [a, b] = [across.of(arm), upward.of(arm)];
    return { arm: arm.name, all: arm, whole: !arm.statuses.diverged, x: a.value, y: b.value, ends: [a.low, a.high], spread: [b.low, b.high] };
  });
  if (points.length < 2) return null;
  const right = across.better === "higher", up = upward.better === "higher", judged = points.filter((one) => one.whole);
  const edge = frontier(judged, right ? 1 : -1, up ? 1 : -1);
  const say = (axis, value) => (axis.metric ? fixed(value, decimalsOf(study)) : digits(value, 4));
  const box = h("div", { class: "plot", role: "img", "aria-label": `${title}. On the frontier: ${
    edge.map((one) => one.arm).join(", ")}. The numbers are in the table.` });

  function tipOf({ arm, whole, x, y, all }) {
    const lines = [arm, `${upward.label}: ${upward.metric ? quality(study, all) : say(upward, y)}`, `${across.label}: ${say(across, x)}`];
    if (!whole) lines.push(`${all.statuses.diverged} of ${all.planned} runs diverged: left out of the frontier`);
    if (known(all.frontier)) lines.push(`on the frontier of throughput and quality in ${percent(all.frontier)} of draws`);
    return lines.join("\n");
  }

  function heights() {  // of the axis upwards: a metric's intervals count if they are not much longer than usual
    if (!upward.metric) return limits(points.map((one) => one.y), RESOURCE);
    const shown = judged.length ? judged : points, long = (one) => one.spread[1] - one.spread[0];
    const usual = shown.map(long).sort((a, b) => a - b)[shown.length >> 1];
    const spreads = shown.filter((one) => known(one.spread[0]) && long(one) <= 3 * usual).flatMap((one) => one.spread);
    return limits([...shown.map((one) => one.y), ...spreads]);
  }

  responsive(box, (width) => {
    const height = within(0.7 * width, 300, 400), area = plotArea(width, height), svg = drawing(width, height);
    const x = scale(...limits(points.map((one) => one.x), RESOURCE), area.left, area.right);
    const y = scale(...heights(), area.bottom, area.top), clamped = (one) => within(y(one.y), area.top, area.bottom);
    const better = [["↙ better", "↖ better"], ["better ↘", "better ↗"]][+right][+up];
    axes(svg, area, x, y, across.label, shorten(upward.label, area.right - area.left - textWidth(better) - 16));
    svg.append(write("better", area.right, 12, better, "end"));
    const worse = (a, b, high) => (high ? Math.min(a, b) : Math.max(a, b));
    const corner = (one, last) => (last ? `L${x(worse(one.x, last.x, right))} ${y(worse(one.y, last.y, up))}L` : "M");
    const stair = edge.map((one, i) => `${corner(one, edge[i - 1])}${x(one.x)} ${y(one.y)}`).join("");
    svg.append(s("path", { class: "frontier", d: stair }));

    const taken = [];
    for (const one of points.sort((a, b) => looks.has(a.arm) - looks.has(b.arm))) {
      const px = x(one.x), py = clamped(one);
      const bar = (ends, map, low, high, path) => (known(ends[0]) && known(ends[1])
        ? s("path", { class: "error", d: path(...ends.map((end) => within(map(end), low, high))) }) : null);
      svg.append(s("g", { class: "point", "data-arm": one.arm, "data-pick": one.arm, "data-tip": tipOf(one) },
        bar(one.spread, y, area.top, area.bottom, (a, b) => `M${px} ${a}V${b}`),
        bar(one.ends, x, area.left, area.right, (a, b) => `M${a} ${py}H${b}`),
        s("path", { class: one.whole ? "dot" : "dot hollow", d: shapeOf(one.arm), transform: `translate(${px} ${py})` }),
        s("circle", { class: "reach", cx: px, cy: py, r: 12 })));
      taken.push([px - 7, py - 7, px + 7, py + 7]);
    }
    const beyond = (one) => (y(one.y) < area.top ? "↑" : y(one.y) > area.bottom ? "↓" : "");
    const weight = (one) => 4 * Boolean(beyond(one)) + 2 * edge.includes(one) + looks.has(one.arm);
    for (const one of points.filter(weight).sort((a, b) => weight(b) - weight(a))) {
      const value = beyond(one) && ` ${beyond(one)} ${say(upward, one.y)}`;
      svg.append(placeLabel(one.arm, shorten(one.arm, area.width * 0.5, 11.5) + value, x(one.x), clamped(one), area, taken));
    }
    box.replaceChildren(svg);
    paint(box);
  });
  return figure(title, null, null, box);
}

function placeLabel(arm, text, px, py, area, taken) {  // nothing, if there is no place for it
  const place = freePlace(text, px, py, area, taken);
  return place ? s("text", { class: "label", "data-arm": arm, x: place[0], y: place[1] }, text) : "";
}

function freePlace(text, px, py, area, taken) {  // for a label, without covering a mark or a label; null if there is none
  const width = textWidth(text, 11.5), left = -9 - width, middle = -width / 2;
  for (const [dx, dy] of [[9, 4], [left, 4], [middle, -12], [middle, 20], [8, -11], [8, 20], [left, -11], [left, 20]]) {
    const [x0, y0, x1, y1] = [px + dx, py + dy - 11, px + dx + width, py + dy + 4];
    if (x0 < area.left || x1 > area.right || y0 < area.top || y1 > area.bottom) continue;
    if (taken.some((one) => one[0] < x1 && x0 < one[2] && one[1] < y1 && y0 < one[3])) continue;
    taken.push([x0, y0, x1, y1]);
    return [x0, py + dy];
  }
  return null;
}

// -- paired differences: a row for each arm; places are in percent, so that no other width needs another drawing -------

const MOST_TOLD = 60;  // rows with their whole text; of judged runs, whose names and notes are long, fewer
const MOST_TOLD_ELSEWHERE = 12;

function forest(study, arms) {
  const margin = study.metric.margin ?? 0, d = decimalsOf(study), of = (arm) => fair(arm.comparison);
  const compared = finite(study.arms.map((arm) => of(arm)?.mean));
  if (!compared.length && !study.arms.some((arm) => arm.comparison?.verdict === "diverges")) return note(study.paired ? "No arm has a seed in common with the baseline yet." : "No arm has a value beside the baseline's.");
  const ends = study.arms.flatMap((arm) => [of(arm)?.mean, of(arm)?.low, of(arm)?.high]);
  const [low, high] = limits([-1.4 * margin, 0, 1.4 * margin, ...ends]), inside = (value) => value >= low && value <= high;
  const at = (value) => `${(100 * (within(value, low, high) - low)) / (high - low)}%`;
  const reference = study.arms.find((arm) => arm.name === study.baseline)?.values ?? {};
  const band = { class: "margin", x: at(-margin), width: `${(200 * margin) / (high - low)}%`, height: "100%" };
  const brief = arms.length > (study.elsewhere ? MOST_TOLD_ELSEWHERE : MOST_TOLD);  // the rest at the pointer
  const interval = (kind, ...parts) => s("svg", { class: `interval ${kind}`, "aria-hidden": "true" }, parts);

  function row(arm) {
    const one = of(arm), reach = finite([one.mean, one.low, one.high]);
    const seeds = !study.paired || !known(one.mean) ? [] : Object.keys(arm.values).filter((seed) => known(reference[seed])).map((seed) => arm.values[seed] - reference[seed]);
    const text = afterVerdict(one.verdict, one.text), told = brief ? text.split(/; | \(p = /)[0] : text;
    return h("div", { class: "forest-row", role: "listitem", "data-arm": arm.name, "data-pick": arm.name },
      h("div", { class: "who" }, swatch(arm.name), h("span", null, breakable(arm.name))),
      interval("", margin > 0 && s("rect", band), line("zero", at(0), 0, at(0), "100%"),
        seeds.filter(inside).map((value) => s("circle", { class: "seed", cx: at(value), cy: "50%", r: 2.5 })),
        known(one.low) ? line("whole", at(one.low), "50%", at(one.high), "50%") : null,
        Math.min(...reach) < low ? s("text", { y: "50%", dy: 4 }, "◂") : null,
        Math.max(...reach) > high ? s("text", { x: "100%", y: "50%", dy: 4, "text-anchor": "end" }, "▸") : null,
        inside(one.mean) && one.mean !== null ? s("circle", { class: "mean", cx: at(one.mean), cy: "50%", r: 5 }) : null),
      h("div", { class: "says", "data-tip": brief && text }, badge(one.verdict), h("span", null, told)));
  }

  const tick = ticks(low, high, 5), [left, right] = study.metric.better === "lower" ? ["better", "worse"] : ["worse", "better"];
  const scaled = interval("scale", tick.all.map((value) => [line("axis", at(value), 0, at(value), 5),
    write("", at(value), 18, (value > 0 ? "+" : "") + tick.show(value), "middle")]));
  const zero = -low / (high - low);  // near an end there is room for one of the two only
  const ways = interval("scale", zero > 0.15 && s("text", { x: at(0), dx: -10, y: 13, "text-anchor": "end" }, `← ${left}`),
    zero < 0.85 && s("text", { x: at(0), dx: 10, y: 13 }, `${right} →`));
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
