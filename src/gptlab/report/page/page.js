// The page from the top down: headline, answers, table, charts, failures, provenance. Each study is a section.

const VERDICTS = {  // verdict: [sign, class of its colour]
  better: ["✓", "good"], worse: ["✕", "bad"], equivalent: ["≈", "same"], "not resolved": ["?", "open"],
  diverges: ["!", "bad"], "reference diverges": ["!", "open"], confirmed: ["✓", "good"], rejected: ["✕", "bad"],
  "not run": ["–", "open"], flips: ["⇅", "bad"], agrees: ["✓", "good"], unresolved: ["?", "open"],
};
const several = payload.studies.length > 1;
const idOf = (study, part) => `study-${payload.studies.indexOf(study)}${part ? `-${part}` : ""}`;

function badge(verdict) {
  const [sign, kind] = VERDICTS[verdict] ?? ["·", "open"];
  return h("span", { class: `badge ${kind}` }, h("span", { "aria-hidden": "true" }, sign), ` ${verdict}`);
}

function afterVerdict(verdict, text) {  // the text without the verdict, which a badge shows already
  return text?.startsWith(`${verdict}: `) ? text.slice(verdict.length + 2) : text ?? "";
}

function quality(study, arm) {
  const d = decimalsOf(study), one = arm.quality;
  return one ? fixed(one.mean, d) + (one.n > 1 && known(one.sd) ? ` ± ${fixed(one.sd, d)}` : "") + ` (${one.n})` : NONE;
}

// -- headline and answers --------------------------------------------------------------------------------------------

function warnings() {
  const texts = payload.warnings ?? [];
  return texts.length > 0 && h("details", { class: "warnings" },
    h("summary", null, h("strong", null, many(texts.length, "warning")), h("span", null, `: ${texts[0]}`)),
    h("ul", null, texts.map((text) => h("li", null, text))));
}

function facts(study) {
  const ended = {};
  for (const arm of study.arms) for (const [status, n] of Object.entries(arm.statuses)) ended[status] = (ended[status] ?? 0) + n;
  const others = Object.keys(ended).filter((status) => status !== "completed").map((status) => `${ended[status]} ${said(status)}`);
  if (study.runs_found < study.runs_planned) others.unshift(`${study.runs_found} found`);
  const margin = known(study.metric.margin) ? `; margin ${study.metric.margin}, ${study.metric.margin_from}` : "";
  const fact = (label, value, more) => h("div", null, h("dt", null, label), h("dd", null, value, more && h("small", null, more)));
  return h("dl", { class: "facts" },
    fact("runs completed", `${ended.completed ?? 0} of ${study.runs_planned}`, others.join(", ")),
    fact("arms", String(study.arms.length), study.arms.length > 1 && `baseline: ${study.baseline}`),
    study.paired && fact("seeds", String(study.seeds.length), study.seeds.length <= 12 && study.seeds.join(", ")),
    fact("metric", study.metric.label, `${study.metric.better} is better${margin}`),
    !study.elsewhere && fact("hardware", study.provenance?.hardware?.join("; ") || NONE),
    study.plan && fact("plan registered", `${study.plan.registered.slice(0, 10)}, sha256 ${study.plan.sha256.slice(0, 12)}`));
}

function reveal(arm, study) {  // scroll to the arm's row in this study's table, or in the first table that has it
  if (!looks.has(arm)) togglePick(arm);
  const whose = study ?? payload.studies.find((one) => one.arms.some((other) => other.name === arm));
  const table = document.getElementById(idOf(whose, "table"));
  const row = [...table.querySelectorAll("tr[data-arm]")].find((one) => one.dataset.arm === arm);
  (row ?? table).scrollIntoView({ block: "center" });
  setHot(arm);
}

function evidence(arms, study) {
  const chips = unique(arms ?? []).filter((arm) => everyArm().includes(arm)).map((arm) =>
    h("button", { type: "button", class: "chip", "data-arm": arm, onclick: () => reveal(arm, study) }, swatch(arm), arm));
  return chips.length > 0 && h("p", { class: "evidence" }, "Evidence: ", chips);
}

function answers(part, study) {  // one sentence for each question, then what follows from all
  const cards = (part.questions ?? []).filter((question) => !question.tabled).map((question) => h("article", { class: "card", "aria-label": question.id },
    h("p", { class: "card-head" }, badge(question.answer), " ", h("strong", null, question.id), " ", question.claim),
    h("p", { class: "finding" }, question.sentence), h("p", { class: "card-text" }, `${question.cost} ${question.change}`),
    h("details", null, h("summary", null, "Numbers"), h("p", { class: "card-text" }, question.text), evidence(question.evidence, study))));
  const none = (one) => (/^no arm is recommended\b/.test(one.text) ? " none" : "");
  const advice = (part.recommendations ?? []).filter((one) => ["overall", "default"].includes(one.id)).map((one) =>
    h("div", { class: `advice${none(one)}` }, h("p", { class: "eyebrow" }, "Recommendation"), h("p", { class: "advice-text" }, one.text),
      evidence(one.evidence, study)));
  return [cards.length > 0 ? h("div", { class: "cards" }, cards) : part.summary && h("p", { class: "finding" }, part.summary), advice];
}

// -- tables ----------------------------------------------------------------------------------------------------------

const bySeed = (study) => (study.paired ? ", paired by seed" : ""), differencesOf = (study) => (study.paired ? "Paired differences" : "Differences");
const filterBy = (label, rows, read, more) => ({
  label, options: unique(rows.map(read).flat().filter(Boolean)).map((value) => [value, said(value)]),
  test: (row, value) => [read(row)].flat().includes(value), ...more,
});
const cells = (prefix, read, keys) => keys.map((key) => [prefix + key, (row) => read(row)?.[key]]);
const plain = (label, key, cell, more) =>
  ({ label, sort: (row) => row[key], cell: cell ?? ((row) => String(row[key] ?? NONE)), csv: [[label, (row) => row[key]]], ...more });

function armCell(study, arm) {
  return h("div", { class: "arm" },
    h("input", { type: "checkbox", "data-pick": arm.name, "aria-label": `show ${arm.name} in the charts` }), swatch(arm.name),
    h("div", null, h("span", { class: "arm-name" }, breakable(arm.name)),
      arm.name === study.baseline && h("small", { class: "tag" }, "baseline"),
      h("small", { class: "arm-note", title: [arm.group, arm.note].filter(Boolean).join(": ") }, arm.note)));
}

function statusCell(arm) {
  const others = Object.entries(arm.statuses).filter(([status]) => status !== "completed");
  return [h("span", null, `${arm.statuses.completed ?? 0} of ${arm.planned}`),
    others.map(([status, n]) => h("small", { class: `status ${status}` }, `${n} ${said(status)}`))];
}

function armColumns(study) {
  const d = decimalsOf(study), show = (value) => fixed(value, d), signed = (value) => fixed(value, d, true);
  const first = (arm) => (study.laws ? !arm.comparison : arm.name === study.baseline), number = true;
  const order = ["better", "equivalent", "not resolved", "reference diverges", "worse", "diverges", "not run"];
  const difference = (arm) => arm.comparison, speed = (arm) => arm.throughput;
  const statuses = unique(study.arms.flatMap((arm) => Object.keys(arm.statuses)));
  const measured = (one, text, form) => stacked(one ? text(one) : NONE, one && between(one.low, one.high, form));
  const extra = ({ key, label }) => ({
    label, number, more: true, sort: (arm) => arm.other?.[key]?.mean, csv: cells(`${key}_`, (arm) => arm.other?.[key], ["mean", "sd"]),
    cell(arm) {
      const one = arm.other?.[key];
      return one ? stacked(digits(one.mean, 4), one.n > 1 && known(one.sd) && `± ${digits(one.sd, 2)}`) : "";
    } });
  return [
    { label: "arm", sort: (arm) => arm.name, cell: (arm) => armCell(study, arm),
      csv: cells("", (arm) => arm, ["name", "group", "note"]) },
    { label: "runs", hint: "completed runs of the planned ones, then the runs that ended otherwise", sort: (arm) => arm.statuses.completed ?? 0, cell: statusCell,
      csv: [["planned", (arm) => arm.planned], ...cells("", (arm) => arm.statuses, statuses)] },
    { label: study.metric.label, number, hint: "mean ± standard deviation (number of seeds); below it the 95% interval of the mean",
      sort: (arm) => arm.quality?.mean, cell: (arm) => stacked(quality(study, arm), between(arm.quality?.low, arm.quality?.high, show)),
      csv: cells(`${study.metric.key}_`, (arm) => arm.quality, ["mean", "sd", "n", "low", "high"]) },
    { label: "difference", number, hint: `from ${study.against ?? study.baseline}${bySeed(study)}, with its 95% interval`,
      sort: (arm) => fair(difference(arm))?.mean, cell: (arm) => (first(arm) ? "" : measured(fair(difference(arm)), (one) => signed(one.mean), signed)),
      csv: cells("difference_", difference, ["mean", "sd", "n", "low", "high", "p", "p_holm", "p_equivalent", "mde"]) },
    { label: "verdict", hint: `the numbers behind the verdict are under ${differencesOf(study)}`,
      sort: (arm) => difference(arm) && order.indexOf(difference(arm).verdict), csv: cells("", difference, ["verdict"]),
      cell: (arm) => difference(arm) && h("span", { "data-tip": difference(arm).text }, badge(difference(arm).verdict)) },
    study.groups && plain("groups", "groups", (arm) => study.groups.letters[arm.name] ?? NONE,
      { sort: (arm) => study.groups.order.indexOf(arm.name), csv: [["groups", (arm) => study.groups.letters[arm.name]]],
        hint: "arms that share a letter cannot be told apart" }),
    ...(study.elsewhere ? [] : machineColumns(study)),
    study.arms.some((arm) => known(arm.frontier))
      && plain("frontier", "frontier", (arm) => (known(arm.frontier) ? percent(arm.frontier) : ""),
        { number, more: true, hint: "share of simulated draws in which the arm is on the frontier of throughput and quality" }),
    !study.elsewhere && { label: `${study.unit}/s, 95% interval`, number, more: true, sort: (arm) => speed(arm)?.low,
      cell: (arm) => between(speed(arm)?.low, speed(arm)?.high, digits) || NONE },
    ...(study.columns ?? []).map(extra),
  ].filter(Boolean);
}

function machineColumns(study) {
  const ratio = (value) => fixed(value, 2), first = (arm) => (study.laws ? !arm.comparison : arm.name === study.baseline), number = true;
  const speed = (arm) => arm.throughput, gain = (arm) => arm.speedup;
  return [
    { label: `${study.unit}/s`, number, hint: `${study.unit} per second; below it the speed-up over the baseline with its 95% interval`,
      sort: (arm) => speed(arm)?.value, cell: (arm) => stacked(digits(speed(arm)?.value),
        !first(arm) && gain(arm) && `${ratio(gain(arm).value)}× ${between(gain(arm).low, gain(arm).high, ratio)}`),
      csv: [...cells(`${study.unit}_per_second_`, speed, ["value", "low", "high", "n"]),
        ...cells("speedup_", gain, ["value", "low", "high", "n"])] },
    { label: "memory, GB", number, hint: "peak memory, and its ratio to the baseline's", sort: (arm) => arm.memory_gb?.mean,
      cell: (arm) => stacked(digits(arm.memory_gb?.mean), !first(arm) && known(arm.memory_ratio) && `${ratio(arm.memory_ratio)}×`),
      csv: [["memory_gb", (arm) => arm.memory_gb?.mean], ["memory_ratio", (arm) => arm.memory_ratio]] },
  ];
}

function rankedArms(study) {  // the best mean first, where all pairs are compared
  return study.groups ? study.groups.order.map((name) => study.arms.find((arm) => arm.name === name)) : study.arms;
}

function armTable(study, shown) {
  const settings = (arm) => Object.entries(arm.settings ?? {}).map((one) => one.join(" "));
  return dataTable({
    name: study.name, caption: `arms of ${study.name}`, rows: rankedArms(study), columns: armColumns(study), shown,
    words: (arm) => [arm.name, arm.group, arm.note, arm.comparison?.verdict, ...settings(arm)].join(" "),
    filters: [filterBy("group", study.arms, (arm) => arm.group), filterBy("status", study.arms, (arm) => Object.keys(arm.statuses)),
      filterBy("verdict", study.arms, (arm) => arm.comparison?.verdict)],
    rowAttributes: (arm) => ({ "data-arm": arm.name, "data-pick": arm.name }),
  });
}

function failureTable(study) {
  const rows = study.failures ?? [];
  return rows.length === 0 ? note(study.elsewhere ? "No run diverged or ended early." : "No run diverged, ran out of memory or failed.") : dataTable({
    name: `${study.name}-failures`, caption: `runs of ${study.name} that failed`, rows, words: (row) => Object.values(row).join(" "),
    columns: [plain("arm", "arm"), plain("seed", "seed", null, { number: true }),
      plain("status", "status", (row) => h("span", { class: `status ${row.status}` }, said(row.status))),
      plain("step", "step", (row) => fixed(row.step, 0), { number: true }),
      plain("mechanism", "failure", (row) => (row.failure ? said(row.failure) : NONE)),
      plain("tensor", "tensor", (row) => (row.tensor ? h("code", null, row.tensor) : NONE)),
      plain("reason", "reason", (row) => h("span", { class: "prose" }, row.reason ?? NONE))],
    filters: [filterBy("status", rows, (row) => row.status)], rowAttributes: (row) => ({ "data-arm": row.arm }),
  });
}

function equalTable(study) {  // losses at the cost of the cheapest run
  const d = decimalsOf(study), at = (arm, equal) => equal.arms.find((one) => one.name === arm.name);
  const numbers = ["mean", "sd", "n", "low", "high"];
  return dataTable({
    name: `${study.name}-equal`, caption: `arms of ${study.name} at equal cost`, rows: study.arms, words: (arm) => arm.name,
    columns: [plain("arm", "name"), ...study.equal.map((equal) => ({
      label: `at ${digits(equal.budget)} ${equal.what}`, number: true, sort: (arm) => at(arm, equal).quality?.mean,
      cell(arm) {
        const { quality: one, difference: to } = at(arm, equal), show = (value) => fixed(value, d, true);
        return one ? stacked(fixed(one.mean, d), to && `${show(to.mean)} ${between(to.low, to.high, show) || ""}`) : NONE;
      },
      csv: [...cells(`${equal.what}_`, (arm) => at(arm, equal).quality, numbers),
        ...cells(`${equal.what}_difference_`, (arm) => at(arm, equal).difference, numbers)],
    }))],
    rowAttributes: (arm) => ({ "data-arm": arm.name, "data-pick": arm.name }),
  });
}

function withinTable(study) {  // HellaSwag's rows, resampled for each seed
  const rows = study.within ?? [], show = (value) => fixed(value, 4, true);
  return dataTable({
    name: `${study.name}-hellaswag`, caption: `HellaSwag of ${study.name}, seed by seed`, rows, words: (row) => `${row.arm} ${row.seed}`,
    columns: [plain("arm", "arm"), plain("seed", "seed", null, { number: true }), plain("rows", "rows", null, { number: true }),
      plain("difference", "mean", (row) => show(row.mean), { number: true }),
      plain("low", "low", (row) => show(row.low), { number: true }), plain("high", "high", (row) => show(row.high), { number: true })],
    rowAttributes: (row) => ({ "data-arm": row.arm }),
  });
}

function flipTable(across) {
  const order = ["flips", "diverges", "agrees", "equivalent", "unresolved"], rank = (row) => order.indexOf(row.verdict);
  const rows = [...(across.flips ?? [])].sort((a, b) => rank(a) - rank(b));
  const count = (verdict) => `${verdict}: ${rows.filter((row) => row.verdict === verdict).length}`;
  const small = (p) => (known(p) && p < 0.001 ? "< 0.001" : digits(p, 2));
  return rows.length === 0 ? note("No pair of arms could be compared.") : [
    note(`Pairs of arms: ${unique(rows.map((row) => row.verdict)).map(count).join(", ")}.`),
    dataTable({
      name: `${across.name}-flips`, caption: "pairs of arms across studies", rows, rowAttributes: (row) => ({ "data-arm": row.arm }),
      words: (row) => [row.arm, row.reference, row.text].join(" "),
      filters: [filterBy("verdict", rows, (row) => row.verdict, { first: "flips" })],
      columns: [plain("arm", "arm"), plain("against", "reference"),
        plain("verdict", "verdict", (row) => badge(row.verdict), { sort: rank }),
        plain("p of the interaction", "p_interaction", (row) => small(row.p_interaction), { number: true }),
        plain("in numbers", "text", (row) => h("span", { class: "prose" }, afterVerdict(row.verdict, row.text)), { sort: null })],
    })];
}

// -- picks and provenance --------------------------------------------------------------------------------------------

function firstPicks() {
  const said = [payload.across, ...payload.studies].filter(Boolean).flatMap((part) =>
    [...(part.recommendations ?? []), ...(part.questions ?? []).filter((one) => !one.tabled)].flatMap((one) => one.evidence ?? []));
  const flips = (payload.across?.ranks ?? []).filter((rank) => rank.flip).map((rank) => rank.arm);
  const best = payload.studies.flatMap((study) => {
    const sign = study.metric.better === "lower" ? 1 : -1;
    return study.arms.filter((arm) => arm.quality).sort((a, b) => sign * (a.quality.mean - b.quality.mean));
  });
  const order = [...payload.studies.map((study) => study.baseline), ...flips, ...said, ...best.map((arm) => arm.name)], all = everyArm();
  const picks = unique([...order, ...all]).filter((arm) => all.includes(arm)), worst = all.length > MANY && best.at(-1)?.name;
  return unique([...picks.slice(0, COLORS - Boolean(worst)), ...(worst ? [worst] : [])]);
}

function provenance(study) {
  const from = study.provenance ?? {}, fold = (title, content) => h("details", null, h("summary", null, title), content);
  const named = Object.entries(from.versions ?? {}).filter(([, all]) => all.length);
  const versions = named.map(([what, all]) => `${what} ${all.join(", ")}`);
  const rows = Object.entries(study.elsewhere ? { "Read from": from.sources }
    : { Hardware: from.hardware, Versions: versions, Commits: from.commits, Folder: [study.folder] });
  const told = ([label, all]) => all?.filter(Boolean).length > 0
    && [h("dt", null, label), h("dd", null, all.map((one) => h("div", null, one)))];
  const overrides = Object.entries(from.overrides ?? {}).map(([arm, text]) => h("tr", { "data-arm": arm },
    h("th", { scope: "row" }, arm), h("td", null, h("pre", null, String(text).trim() || "the recipe unchanged"))));
  return [
    from.command && [h("h4", null, study.elsewhere ? "Judge again" : "Repeat this study"), copyable(from.command, "command that repeats the study")],
    h("dl", { class: "origin" }, rows.map(told)),
    from.flags && fold("Command-line flags that override the recipe", copyable(String(from.flags), "flags")),
    from.recipe && fold("Recipe, as TOML", copyable(from.recipe, "recipe")),
    overrides.length > 0 && fold(`Settings of ${many(overrides.length, "arm")}`,
      scrolling("overrides", h("table", null, h("tbody", null, overrides)))),
  ];
}

// -- sections --------------------------------------------------------------------------------------------------------

function studySection(study) {
  const part = (key, title, ...content) => h("section", { id: idOf(study, key), class: "part" }, h("h3", null, title), content);
  const section = (...content) => h("section", { id: idOf(study), class: "study", "aria-label": study.name },
    h("h2", { class: !several && study.name === payload.title && "unseen" }, study.name),
    study.description && h("p", { class: "lead" }, study.description),
    h("div", { id: idOf(study, "answers"), class: "answers" }, answers(study, study)), facts(study), content);
  const origin = part("origin", "Provenance", provenance(study));
  if (!study.arms.length) return section(note("No arm of this study has a run yet."), origin);

  const differences = h("div"), margin = study.metric.margin;
  const table = armTable(study, (arms) => differences.replaceChildren(forest(study, arms)));
  const mean = (one) => one && { ...one, value: one.mean };
  const good = { label: study.metric.label, better: study.metric.better, of: (arm) => mean(arm.quality), metric: true };
  const speed = { label: `${study.unit} per second`, better: "higher", of: (arm) => arm.throughput };
  const memory = { label: "peak memory, GB", better: "lower", of: (arm) => mean(arm.memory_gb) };
  const charts = [tradeOff(study, "Quality against throughput", speed, good), tradeOff(study, "Quality against memory", memory, good),
    tradeOff(study, "Throughput against memory", memory, speed)].filter(Boolean);
  return section(
    factorPart(study, part),
    lawPart(study, part),
    sweepPart(study, part),
    part("table", "Arms", note("Click a row to show or hide the arm in the charts; click a header to sort. Intervals are 95%."
      + (study.paired ? " Differences are paired by seed." : "")), study.groups && note(groupsNote(study)),
    study.questions?.some((one) => !one.tabled) && note(study.summary), (study.notes ?? []).map(note), table),
    part("curves", "Charts", legend(study.arms.map((arm) => arm.name)), curveChart(study, lossesOf(study)), charts.length > 0 && h("div", { class: "pair" }, charts),
      !study.elsewhere && note(charts.length === 0 ? "Fewer than two arms have both a quality and a throughput."
        : "The line is the Pareto frontier of the means: no other arm is as good in both and better in one. Bars are 95% "
        + "intervals. Hollow marks are arms with diverged runs, which are left out of the frontier.")),
    study.arms.length > 1 && part("differences", differencesOf(study), note(`Each arm minus ${study.against ?? study.baseline}${bySeed(study)}, in ${study.metric.label}. `
      + `Dot and line: mean with its 95% interval.${study.paired ? " Small rings: single seeds." : ""} Rows follow the order and filters of the table.`
      + (known(margin) ? ` Band: the margin of ${margin}; differences inside it are too small to matter.` : "")), differences),
    (study.equal ?? []).length ? part("equal", "At equal cost", note("Validation loss when each run had spent as much as the cheapest "
      + `run spent in total; below it the difference from ${study.baseline} with its 95% interval, not adjusted. A longer run is read off `
      + "its curve before its learning rate has decayed, which counts against it."), equalTable(study)) : null,
    targetParts(study, part),
    (study.within ?? []).length ? part("within", "HellaSwag, seed by seed", note(`The share of correct rows minus that of ${study.baseline} with the same `
      + "seed, and its 95% interval over rows (bootstrap). The interval holds for other rows and these weights; it says nothing "
      + "about other seeds."), withinTable(study)) : null,
    part("failures", "Failures", failureTable(study)), origin);
}

function groupsNote(study) {
  const { groups, family } = study.groups;
  return `All ${many(family, "pair")} of arms are compared, as one family. Arms that share a letter cannot be told apart; of two arms `
    + `without a letter in common, one is better.${groups.length ? "" : " There are too many groups to name."}`;
}

function acrossSection(across) {
  const part = (title, ...content) => h("section", { class: "part" }, h("h3", null, title), content);
  return h("section", { id: "across", class: "study", "aria-label": "across studies" },
    h("h2", null, `Across studies: ${across.name}`), across.description && h("p", { class: "lead" }, across.description),
    h("div", { class: "answers" }, answers(across)),
    part("Ranking", across.ranking && h("p", { class: "lead" }, across.ranking.text), slopeChart(across)),
    part("Flips", flipTable(across)));
}

function navigation() {
  const parts = { answers: "Answers", factors: "Changes", laws: "Scale", sweeps: "Sweeps", table: "Arms", curves: "Charts",
    differences: "Differences", failures: "Failures", origin: "Provenance" };
  const links = payload.studies.flatMap((study) =>
    (several ? [[idOf(study), study.name]] : Object.entries(parts).map(([key, text]) => [idOf(study, key), text])));
  if (payload.across) links.unshift(["across", "Across studies"]);
  const anchors = links.filter(([id]) => document.getElementById(id)).map(([id, text]) => h("a", { href: `#${id}` }, text));
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((one) => one.isIntersecting)) {
      for (const anchor of anchors) anchor.setAttribute("aria-current", String(anchor.hash === `#${entry.target.id}`));
    }
  }, { rootMargin: "-25% 0px -65% 0px" });
  for (const anchor of anchors) watch.observe(document.querySelector(anchor.hash));
  return h("div", { class: "wide" }, anchors);
}

put("top", h("p", { class: "eyebrow" }, payload.studies[0]?.elsewhere ? "Runs judged" : "Study report"), h("h1", null, payload.title), warnings());
put("main", payload.across && acrossSection(payload.across), payload.studies.map(studySection));
put("foot", h("p", null, `gptlab ${payload.gptlab ?? ""}`, payload.command && [": ", h("code", null, payload.command)]));
put("nav", navigation());
setPicks(firstPicks());

for (const query of ["print", "(prefers-color-scheme: dark)"]) {
  matchMedia(query).addEventListener("change", () => { for (const redraw of redraws) redraw(); });
}
addEventListener("beforeprint", () => { for (const details of document.querySelectorAll("details")) details.open = true; });
