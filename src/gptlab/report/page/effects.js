// A factorial's effects, and the steps, tokens and seconds to a target.

function effectName(effect) { return [effect.name, ...effect.aliases].join(" or "); }

function factorPart(study, part) {
  const factors = study.factors;
  if (!factors) return null;
  const d = decimalsOf(study), show = (value) => fixed(value, d, true), order = ["better", "worse", "interact", "equivalent", "not resolved"];
  const small = (p) => (known(p) && p < 0.001 ? "< 0.001" : digits(p, 2));
  const table = factors.effects.length > 0 && dataTable({
    name: `${study.name}-factors`, caption: `effects of ${study.name}`, rows: factors.effects, words: (row) => row.text,
    columns: [
      { label: "change", sort: effectName, cell: (row) => stacked(effectName(row), row.note), csv: [["effect", effectName], ["note", (row) => row.note]] },
      { label: `effect on ${study.metric.label}`, number: true, sort: (row) => row.effect,
        hint: "mean with it on minus mean with it off; below it the 95% interval, which holds together with all others",
        cell: (row) => stacked(show(row.effect), between(row.low, row.high, show)), csv: cells("", (row) => row, ["effect", "low", "high"]) },
      plain("p", "p_adjusted", (row) => small(row.p_adjusted), { number: true, hint: "over all effects, by Bonferroni" }),
      plain("verdict", "verdict", (row) => badge(row.verdict), { sort: (row) => order.indexOf(row.verdict) }),
    ],
    filters: [filterBy("kind", factors.effects, (row) => row.kind), filterBy("verdict", factors.effects, (row) => row.verdict)],
  });
  return part("factors", "Which change did it", h("p", { class: "lead" }, `${factors.text}.`), table,
    note(factors.design), factors.notes.map(note));
}

function targetParts(study, part) {
  const count = (value) => (known(value) ? Math.round(value).toLocaleString("en") : NONE), ratio = (value) => fixed(value, 2);
  const told = (one, form) => (known(one.value) ? `${one.of === "median" ? "median " : ""}${form(one.value)}` : known(one.low) ? `over ${form(one.low)}` : one.of === "median" ? "median unknown" : NONE);
  const followed = (arm, unit) => Math.max(...finite(arm.each.map((run) => run[unit])));
  const never = (arm, unit, form) => arm.reached === 0 && arm.each.length > 0 && `not in ${form(followed(arm, unit))}`;
  const ends = (one, form) => known(one.value) && known(one.low) && (known(one.high) ? between(one.low, one.high, form) : `at least ${form(one.low)}`);
  const tabled = (study.questions ?? []).filter((one) => one.tabled);
  const asked = (arm, { target }) => tabled.find((one) => one.target === target && one.contrast[0] === arm.name) ?? {};
  const mean = (target) => plain("mean reaches it", "mean", (arm) => stacked(badge(asked(arm, target).answer),
    known(asked(arm, target).p) && `p = ${digits(asked(arm, target).p, 2)}`), { sort: (arm) => asked(arm, target).p,
    csv: [["mean", (arm) => asked(arm, target).answer], ["p", (arm) => asked(arm, target).p]],
    hint: "whether the arm's mean reaches it: one-sided t, after Holm over all arms and targets" });
  return (study.targets ?? []).map((target, i) => part(`target-${i}`, `To a ${target.label ?? "validation loss"} of ${target.target}`,
    dataTable({
      name: `${study.name}-to-${target.target}`, caption: `time to ${target.target} of ${study.name}`, rows: rankedArms(study).map((arm) => target.arms.find((one) => one.name === arm.name)),
      words: (arm) => arm.text,
      columns: [plain("arm", "name"), tabled.some((one) => one.target === target.target) && mean(target),
        plain("runs", "reached", (arm) => `${arm.reached} of ${arm.runs}`, { number: true, hint: "runs that reach it" }),
        ...target.units.map((unit) => ({
          label: unit, number: true, sort: (arm) => arm[unit].value ?? arm[unit].low,
          cell(arm) {
            const form = unit === "steps" ? count : unit === "seconds" ? digits : human;
            return never(arm, unit, form) || stacked(told(arm[unit], form), ends(arm[unit], form));
          },
          csv: cells(`${unit}_`, (arm) => arm[unit], ["of", "value", "low", "high"]),
        })),
        ...target.units.map((unit) => ({
          label: `times fewer ${unit}`, number: true, more: unit !== "steps", sort: (arm) => arm.ratio?.[unit].value,
          hint: `than ${study.baseline}${bySeed(study)}, with its 95% interval`,
          cell: (arm) => (arm.ratio ? stacked(told({ ...arm.ratio[unit], of: "" }, ratio), ends(arm.ratio[unit], ratio)) : ""),
          csv: cells(`times_fewer_${unit}_`, (arm) => arm.ratio?.[unit], ["value", "low", "high"]),
        }))].filter(Boolean),
      rowAttributes: (arm) => ({ "data-arm": arm.name, "data-pick": arm.name }),
    }), note(target.note)));
}
