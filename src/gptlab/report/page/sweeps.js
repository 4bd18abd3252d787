// Sweeps: the metric over a setting, the fitted curve, and the best value with its interval.

const setting = (value) => (value >= 0.01 ? digits(value, 2) : value.toExponential(1).replace(".0e", "e").replaceAll("-", "−"));

function sweepPart(study, part) {
  const { sweeps, drifts, level } = study.sweeps ?? {};
  if (!sweeps) return null;
  const d = decimalsOf(study), best = (row) => row.optimum, sure = percent(level), number = true;
  const ends = (row) => best(row) && [best(row).open_below ? "…" : known(best(row).low) && setting(best(row).low), best(row).open_above ? "…" : known(best(row).high) && setting(best(row).high)];
  const twice = (row) => (best(row)?.curvature_low > 0 ? best(row).curvature * Math.LN2 ** 2 : null);
  const table = dataTable({
    name: `${study.name}-sweeps`, caption: `sweeps of ${study.name}`, rows: sweeps, words: (row) => row.text,
    columns: [
      sweeps.length > 1 && plain("sweep", "name"), plain("setting", "setting"),
      { label: "best value", number, sort: (row) => best(row)?.value, hint: `where the fitted curve is lowest; below it the ${sure} interval`,
        cell: (row) => (!best(row) ? NONE : best(row).edge ? stacked(setting(best(row)[best(row).edge]), `${best(row).edge} of its grid`)
          : stacked(setting(best(row).value), ends(row).every(Boolean) && `[${ends(row).join(", ")}]`)),
        csv: cells("", best, ["value", "low", "high", "lowest", "highest", "edge"]) },
      { label: `${study.metric.label} there`, number, sort: (row) => best(row)?.loss, hint: `below it the ${sure} interval over seeds`,
        cell: (row) => stacked(fixed(best(row)?.loss, d), between(best(row)?.loss_low, best(row)?.loss_high, (value) => fixed(value, d))),
        csv: cells("", best, ["loss", "loss_low", "loss_high"]) },
      { label: "twice or half costs", number, sort: twice, cell: (row) => digits(twice(row), 2), csv: cells("", best, ["curvature", "curvature_low", "curvature_high"]) },
      plain("in words", "text", (row) => h("span", { class: "prose" }, row.text), { sort: null }),
    ].filter(Boolean),
  });
  const groups = new Map();
  for (const sweep of sweeps) {
    const of = drifts.find((one) => one.sweeps.includes(sweep.name))?.of ?? "", key = JSON.stringify([sweep.setting, of]);
    groups.set(key, [...(groups.get(key) ?? []), sweep]);
  }
  const charts = [...groups].map(([key, group]) => sweepChart(study, JSON.parse(key), group, sure));
  return part("sweeps", "Sweeps", drifts.map((one) => h("p", { class: "finding" }, `${one.text}.`)), table,
    h("div", { class: "pair" }, charts), note(`Dots are runs. The curve is a parabola in the logarithm with a small third and fourth power, fitted to the `
      + `values next to the best; runs of one seed share an offset. Bars below: the best value with its ${sure} interval.`));
}

function sweepChart(study, [name, of], sweeps, sure) {
  const dots = (sweep) => sweep.points.flatMap((point) => Object.entries(point.losses).map(([seed, y]) => ({ x: point.value, y, tip: `${point.arm}, seed ${seed}` })));
  const all = sweeps.flatMap(dots), known_ = (sweep) => sweep.optimum && known(sweep.optimum.value);
  const box = h("div", { class: "plot", role: "img", "aria-label": `${study.metric.label} over ${name}. ${sweeps.map((one) => one.text).join("; ")}` });
  responsive(box, (width) => {
    const height = within(0.7 * width, 300, 400) + 9 * sweeps.length, area = plotArea(width, height), svg = drawing(width, height);
    const left = Math.min(...all.map((one) => one.x)), right = Math.max(...all.map((one) => one.x)), room = (right / left) ** 0.05;
    const x = scale(left / room, right * room, area.left, area.right, true), floor = area.bottom - 8 - 9 * sweeps.length;
    const y = scale(...limits(all.map((one) => one.y)), floor, area.top), inside = (value) => within(y(value), area.top, floor);
    axes(svg, area, x, Object.assign((value) => y(value), { low: y.back(area.bottom), high: y.high, log: false }), name, study.metric.label);
    const taken = [];
    for (const [i, sweep] of sweeps.entries()) {
      const group = s("g", { "data-tip": sweep.text }), at = floor + 8 + 9 * i, put = (value) => within(x(value), area.left, area.right);
      group.style.setProperty("--look", colorOf(i));
      group.append(...dots(sweep).map((one) => s("circle", { class: "leaves", cx: x(one.x), cy: inside(one.y), r: 3, opacity: 0.6, "data-tip": `${one.tip}: ${fixed(one.y, decimalsOf(study))}` })));
      const curve = sweep.curve.map(([a, b]) => `${x(a)} ${inside(b)}`);
      if (curve.length) group.append(s("path", { class: "cross", d: `M${curve.join("L")}` }));
      if (known_(sweep)) {
        const one = sweep.optimum, low = one.open_below ? area.left : known(one.low) && put(one.low), high = one.open_above ? area.right : known(one.high) && put(one.high);
        if (low !== false && high !== false) group.append(s("path", { class: "error", "stroke-width": 4, d: `M${low} ${at}H${high}` }));
        group.append(s("circle", { class: "leaves", cx: put(one.value), cy: at, r: 3.5 }));
      }
      svg.append(group);
      const end = sweep.curve.at(-1), place = sweeps.length > 1 && end && freePlace(sweep.name, x(end[0]), inside(end[1]), area, taken);
      if (place) svg.append(s("text", { class: "label picked", x: place[0], y: place[1] }, sweep.name));
    }
    box.replaceChildren(svg);
  });
  return figure(of || `Over ${name}`, `${sure} intervals under the curves`, null, box);
}
