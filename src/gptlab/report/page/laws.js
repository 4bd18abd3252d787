// The laws of a ladder: the sentence of each pair of arms, loss over compute, differences over size, and coefficients.

const powers = (low, high) => Array.from({ length: 61 }, (_, i) => 10 ** (i - 20)).filter((one) => one >= low * 0.999 && one <= high * 1.001);

function lawChart(title, text, alt, { xName, yName, logY, series }) {  // series: {name, color, points: [[x, y, kind, tip]], curve: [[x, value, low, high]]}
  const rows = series.flatMap(({ points, curve }) => [...points.map(([x, y]) => [x, y]), ...curve.flatMap(([x, ...ys]) => ys.map((y) => [x, y]))])
    .filter(([x, y]) => known(x) && known(y) && (!logY || y > 0));
  if (!rows.length) return null;
  const box = h("div", { class: "plot", role: "img", "aria-label": alt }), xs = rows.map(([x]) => x), own = series.flatMap(({ points, curve }) =>
    [...points.map(([, y]) => y), ...curve.map(([, value]) => value)]).filter(known);
  const far = 1.5 * (Math.max(...own) - Math.min(...own)) || 1, ys = rows.map(([, y]) => y).filter((y) => y >= Math.min(...own) - far && y <= Math.max(...own) + far);
  const redraw = responsive(box, (width) => {
    const height = 320, area = plotArea(width, height), svg = drawing(width, height), [low, high] = [Math.min(...xs), Math.max(...xs)];
    const room = (high / low) ** 0.04 || 1, span = Math.max(...ys) - Math.min(...ys) || 1;
    const ends = logY ? [Math.min(...ys) / 1.03, Math.max(...ys) * 1.03] : [Math.min(...ys, 0) - 0.05 * span, Math.max(...ys, 0) + 0.05 * span];
    const x = scale(low / room, high * room, area.left, area.right, true), y = scale(...ends, area.bottom, area.top, logY);
    axes(svg, area, Object.assign((value) => NaN, { low: 0, high: 0 }), y, xName, yName);
    const marks = powers(x.low, x.high), shown = marks.length > 1 ? marks : [low, high], every = Math.ceil(shown.length / Math.max(2, area.width / 70));
    for (const [i, value] of shown.entries()) {
      if (i % every) continue;
      svg.append(line("axis", x(value), area.bottom, x(value), area.bottom + 4), write("", x(value), area.bottom + 17, value >= 1e12 ? value.toExponential(0).replace("+", "") : human(value), "middle"));
    }
    if (!logY) svg.append(line("axis", area.left, y(0), area.right, y(0)));
    const put = (value) => within(y(value), area.top, area.bottom);
    for (const { name, color, points, curve } of series) {
      const up = curve.filter((row) => row.every(known)), path = (list) => list.map(([a, b]) => `${x(a).toFixed(1)},${put(b).toFixed(1)}`).join(" ");
      if (up.length) {
        svg.append(s("polygon", { fill: color, opacity: 0.15, points: `${path(up.map(([a, , b]) => [a, b]))} ${path(up.map(([a, , , b]) => [a, b]).reverse())}` }),
          s("polyline", { fill: "none", stroke: color, "stroke-width": 1.6, points: path(up.map(([a, b]) => [a, b])) }),
          write("", x(up[0][0]) + 6, put(up[0][1]) - 8, name));
      }
      for (const [a, b, kind, tip] of points) {
        if (!known(a) || !known(b)) continue;
        svg.append(s("circle", { cx: x(a), cy: put(b), r: kind === "short" ? 2.5 : 4.5, fill: kind === "held" ? "none" : color, stroke: color, "stroke-width": 1.6, "data-tip": tip }));
      }
    }
    box.replaceChildren(svg);
  });
  redraw();
  return figure(title, text, null, box);
}

function lawPart(study, part) {
  const { laws } = study;
  if (!laws) return null;
  const d = decimalsOf(study), color = (i) => `hsl(${(210 + i * 137) % 360} 65% 45%)`, form = (value) => digits(value, 4);
  const colors = Object.fromEntries(laws.arms.map(({ arm }, i) => [arm, color(i)]));
  const sentences = [...laws.pairs.map((pair) => pair.text), ...laws.arms.filter((arm) => arm.held_out).map((arm) => `${arm.held_out.text}.`)];
  const kind = (point) => (point.held_out ? "held" : point.longest ? "" : "short");
  const key = h("p", { class: "note" }, laws.arms.map(({ arm }) => [s("svg", { width: 14, height: 10 }, s("circle", { cx: 5, cy: 5, r: 4, fill: colors[arm] })), `${arm} `]));
  const losses = lawChart("Loss over compute", `Both axes are logarithmic. Lines are the laws of the longest runs with their ${percent(laws.level)} intervals; small dots are runs with `
    + `fewer tokens.${laws.held_out ? ` Rings: ${laws.held_out}, held out.` : ""}`, sentences.join(" "), {
    xName: "training FLOPs", yName: laws.label, logY: true,
    series: laws.arms.map(({ arm, points, curve }) => ({ name: arm, color: colors[arm], curve,
      points: points.map((p) => [p.compute, p.loss, kind(p), `${arm} ${p.size}, ${p.tokens_per_parameter} tokens per parameter, seed ${p.seed}\n${fixed(p.loss, d)}`]) })),
  });
  const differences = lawChart("Difference over size", `Each arm minus the baseline at the same size, by the laws, with its ${percent(laws.level)} interval; dots are the sizes asked for.`,
    laws.pairs.map((pair) => pair.text).join(" "), {
      xName: "parameters without embeddings", yName: "difference", logY: false,
      series: laws.pairs.map((pair) => ({ name: pair.a, color: colors[pair.a], curve: pair.curve,
        points: pair.at.map((row) => [row.n, row.value, "", `${pair.a} at ${row.size}: ${form(row.value)} ${between(row.low, row.high, form) ?? ""}`]) })),
    });
  const rows = laws.arms.flatMap(({ arm, laws: own }) => own.map((law) => ({ arm, ...law })));
  const table = dataTable({
    name: `${study.name}-laws`, caption: `laws of ${study.name}`, rows, words: (row) => `${row.arm} ${row.law}`,
    columns: [plain("arm", "arm"), plain("law", "law"),
      plain("loss of", "formula", (row) => (row.formula ? stacked(row.formula, (row.remarks ?? []).join("; ")) : row.why), { sort: null }),
      plain("loss it ends at", "e", (row) => (known(row.e) ? stacked(fixed(row.e, d), between(row.e_low, row.e_high, (value) => fixed(value, d))) : ""), { number: true }),
      plain("spread", "spread", (row) => (known(row.spread) ? `${digits(100 * row.spread, 2)}%` : ""), { number: true, hint: "relative standard deviation of a run about the law" })],
  });
  return part("laws", "What holds at scale", sentences.map((text) => h("p", { class: "lead" }, text)), key,
    h("div", { class: "pair" }, [losses, differences].filter(Boolean)), table, laws.notes.map(note));
}
