// The page of a run, or of the runs that `gptlab watch` follows: state, curves, samples, results, settings. Where a server
// answers, it is asked for what has changed; the charts keep their zoom, and a new run or metric builds the page anew.

const study = payload.studies[0], live = Boolean(payload.wait);
const alone = () => study.runs.length === 1;

const OTHERS = "Point, touch or press ← and → to read values; drag to zoom, double-click to reset.";
const kind = (label, keys, axis, more) => ({ label, keys, axis, ...more });
const CHARTS = [
  { title: "Loss", none: "No loss has been logged yet.",
    text: `Training: thin as logged, thick smoothed; validation: with dots. Cross: the run diverged. ${OTHERS}`,
    kinds: [kind("both", ["train", "val"], "loss, nats", { late: true }), kind("validation", ["val"], "validation loss", { late: true }),
      kind("training", ["train"], "training loss", { late: true })] },
  { title: "Learning rate", kinds: [kind("", ["lr"], "learning rate", { range: { all: true } })] },
  { title: "Gradient norm", kinds: [kind("", ["grad_norm"], "gradient norm")] },
  { title: "Throughput", kinds: [kind("tokens", ["tokens_per_second"], "tokens per second", { range: { least: 0.1 } }),
    kind("samples", ["samples_per_second"], "samples per second", { range: { least: 0.1 } })] },
  { title: "Peak memory", kinds: [kind("", ["memory_gb"], "GB", { range: RESOURCE })] },
  { title: "Largest logit", kinds: [kind("", ["largest_logit"], "largest |logit|")] },
  { title: "HellaSwag", kinds: [["acc_norm", "hellaswag_acc_norm"], ["acc", "hellaswag_acc"], ["acc_norm, lm-eval's", "hellaswag_harness_acc_norm"],
    ["acc, lm-eval's", "hellaswag_harness_acc"]].map(([name, key]) => kind(name, [key], `share of correct rows, ${name}`, { range: { all: true } })) },
];
const drawn = () => CHARTS.filter((chart, i) => !i || chart.kinds.some((one) => one.keys.every((key) => logged(study, key))));

function firstPicks() {  // what trains, then what was written last
  const order = [...study.runs].sort((a, b) => (b.status === "running") - (a.status === "running") || b.written - a.written);
  return order.slice(0, COLORS).map((run) => run.arm);
}

// -- words -----------------------------------------------------------------------------------------------------------

const count = (value) => (known(value) ? fixed(value, 0) : NONE);
const stepOf = (run) => (known(run.limit) && run.step !== run.limit ? `${count(run.step)} of ${count(run.limit)}` : count(run.step));

function lasting(seconds) {
  if (!known(seconds)) return "";
  const whole = Math.round(seconds), [days, hours, minutes] = [whole / 86400, (whole / 3600) % 24, (whole / 60) % 60].map(Math.floor);
  if (days) return `${days} d ${hours} h`;
  return hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

const statusCell = (run) => stacked(h("span", { class: `status ${run.status}` }, said(run.status)),
  run.status === "running" && run.left > 0 && `${lasting(run.left)} left`);
const rateOf = (run) => (known(run.rate) ? `${human(run.rate)} ${run.unit}/s` : NONE);
const bestOf = (run) => stacked(fixed(run.best, 4), known(run.best_step) && `at step ${count(run.best_step)}`);

// -- parts -----------------------------------------------------------------------------------------------------------

function kept(build) {  // an element that is built anew when the payload changes
  const box = h("div"), show = () => box.replaceChildren(...[build()].flat(Infinity).filter(Boolean));
  refreshes.add(show);
  show();
  return box;
}

function state() {
  const run = study.runs[0];
  const fact = (label, ...value) => h("div", null, h("dt", null, label), h("dd", null, value));
  return [h("dl", { class: "facts" }, fact("status", statusCell(run)), fact("step", stepOf(run)), fact("best validation loss", bestOf(run)),
    fact("throughput", rateOf(run)), run.recipe && fact("recipe", run.recipe)),
  run.reason && h("p", { class: "note" }, run.reason), run.differs && note(`Differs from the recipe: ${run.differs}`)];
}

function runsTable() {
  const column = (label, key, cell, more) => ({ label, sort: (run) => run[key], cell, csv: [[key, (run) => run[key]]], ...more });
  return dataTable({
    name: payload.title, caption: "runs", rows: study.runs, words: (run) => [run.arm, run.recipe, run.status, run.differs].join(" "),
    columns: [
      column("run", "arm", (run) => h("div", { class: "arm" },
        h("input", { type: "checkbox", "data-pick": run.arm, "aria-label": `show ${run.arm} in the charts` }), swatch(run.arm),
        h("div", null, h("span", { class: "arm-name" }, breakable(run.arm)), h("small", { class: "arm-note" }, run.recipe)))),
      column("status", "status", statusCell), column("step", "step", stepOf, { number: true }),
      column("best validation loss", "best", bestOf, { number: true }), column("throughput", "rate", rateOf, { number: true }),
      column("written", "written", (run) => `${lasting((Date.now() - run.written) / 1000)} ago`, { number: true }),
      column("differs from the recipe", "differs", (run) => [run.differs, run.reason && h("span", { class: "prose" }, run.reason)]),
    ],
    filters: [["status", "status"], ["recipe", "recipe"]].map(([label, key]) => ({
      label, options: unique(study.runs.map((run) => run[key])).map((value) => [value, said(value)]), test: (run, value) => run[key] === value })),
    rowAttributes: (run) => ({ "data-arm": run.arm, "data-pick": run.arm }),
  });
}

const pairs = (caption, rows) => scrolling(caption, h("table", { class: "pairs" }, h("caption", { class: "unseen" }, caption),
  h("tbody", null, rows.map(([name, value]) => h("tr", null, h("th", { scope: "row" }, breakable(name)), h("td", null, value))))));

function samples() {  // of a run alone its last and earlier ones, of several the last of each
  const shown = study.runs.filter((run) => run.samples.length).map((run) => [run, run.samples.at(-1)]);
  if (!shown.length) return null;
  const text = (one) => h("pre", { class: "sample", tabindex: 0 }, one.text);
  if (!alone()) return shown.map(([run, last]) => [h("h4", null, `${run.arm}, step ${count(last.step)}`), text(last)]);
  const [run, last] = shown[0], earlier = run.samples.slice(0, -1).reverse();
  return [h("h4", null, `Step ${count(last.step)}`), text(last),
    earlier.map((one) => h("details", null, h("summary", null, `Step ${count(one.step)}`), text(one)))];
}

// -- the page --------------------------------------------------------------------------------------------------------

let built = "";
const shape = () => JSON.stringify([study.runs.map((run) => run.arm), drawn().map((chart) => chart.kinds.map((one) => one.keys.every((key) => logged(study, key)))),
  study.runs.map((run) => [Boolean(run.samples.length), alone() && run.results.length])]);

function settle() {  // what follows from the runs: each is an arm of its own
  study.single = true;
  study.arms = study.runs.map((run) => ({ name: run.arm }));
  study.means = Object.fromEntries(study.runs.map((run) => [run.arm, run]));
}

function build() {
  for (const all of [redraws, refreshes, hotWatchers]) all.clear();
  const part = (key, title, ...content) => h("section", { id: key, class: "part" }, h("h3", null, title), content);
  const charts = drawn().map((chart) => curveChart(study, chart)), run = study.runs[0];
  const sections = [
    !study.runs.length && note(`No run is in ${payload.folder ?? "this folder"} yet.`),
    alone() ? kept(state) : study.runs.length > 0 && part("runs", many(study.runs.length, "run"), runsTable()),
    study.runs.length > 0 && part("curves", "Curves", !alone() && legend(everyArm()), charts[0], h("div", { class: "pair" }, charts.slice(1))),
    study.runs.some((one) => one.samples.length) && part("samples", "Samples", kept(samples)),
    alone() && run.results.length > 0 && part("results", "Results", pairs("results", run.results)),
    alone() && run.settings.length > 0 && part("settings", "Settings", pairs("settings", run.settings)),
    alone() && run.facts.length > 0 && part("origin", "Data and machine", pairs("data and machine", run.facts)),
  ];
  document.getElementById("main").replaceChildren(h("section", { class: "study", "aria-label": payload.title }, sections));
  built = shape();
  const picks = [...looks.keys()].filter((arm) => everyArm().includes(arm));
  setPicks(unique([...picks, ...firstPicks()]).slice(0, Math.max(picks.length, COLORS)));
}

function refresh() {
  settle();
  if (shape() !== built) build();
  else for (const show of refreshes) show();
  paint(document);
}

const pulse = h("p", { class: "lead", role: "status" });
put("top", h("p", { class: "eyebrow" }, live ? "gptlab watch" : "Run"), h("h1", null, breakable(payload.title)), live && pulse);
put("foot", h("p", null, `gptlab ${payload.gptlab}`));

function merge(news) {  // runs that have changed; `names` is all that there are, in order
  const before = new Map(study.runs.map((run) => [run.arm, run]));
  for (const run of news.runs) {
    const old = before.get(run.arm);
    if (old) for (const key of Object.keys(old)) delete old[key];  // rows of a table keep their run
    before.set(run.arm, Object.assign(old ?? {}, run));
  }
  const order = news.names.map((name) => before.get(name)).filter(Boolean);
  const changed = news.runs.length > 0 || order.length !== study.runs.length;
  Object.assign(payload, { version: news.version, wait: news.wait, remarks: news.remarks });
  study.runs = order;
  return changed;
}

function tell(lost) {
  const training = study.runs.filter((run) => run.status === "running").length;
  const now = lost ? "gptlab watch does not answer: it has ended, or the machine is away. What is shown is the last that was read."
    : payload.wait ? `${alone() ? (training ? "training" : "not training") : `${training} of ${many(study.runs.length, "run")} training`}; followed live` : "ended; nothing more is read";
  pulse.textContent = [now, ...(payload.remarks ?? [])].join("; ");
}

async function poll() {
  let lost = false;
  try {
    const answer = await fetch(`data?since=${payload.version}`, { cache: "no-store" });
    if (merge(await answer.json())) refresh();
  } catch { lost = true; }
  tell(lost);
  if (lost || payload.wait) setTimeout(poll, lost ? 5000 : payload.wait);
}

settle();
build();
paint(document);
for (const query of ["print", "(prefers-color-scheme: dark)"]) {
  matchMedia(query).addEventListener("change", () => { for (const redraw of redraws) redraw(); });
}
addEventListener("beforeprint", () => { for (const details of document.querySelectorAll("details")) details.open = true; });
if (live) { tell(false); setTimeout(poll, payload.wait); }
