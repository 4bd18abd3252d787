"""Studies: a recipe, its arms, its seeds and the questions asked of them; and comparisons of two studies."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tomli_w
from pydantic import Field, model_validator

from gptlab.config.factors import Factor, factors_on, two_level_design
from gptlab.config.ladder import Ladder, branch_step, expanded
from gptlab.config.layers import parse_flags, read_layer
from gptlab.config.recipe import Recipe, build_recipe, merged, nested, validated
from gptlab.config.sections import Int, Section
from gptlab.errors import ConfigError

FRONTIER_DIFFERS = "frontier differs"
MOST_ARMS = 5  # that repr names


class Metric(Section):
    """The quantity by which arms are compared."""

    name: str = "final_val_loss"
    """A key of result.json."""
    better: Literal["lower", "higher"] = "lower"
    """Which direction is better."""
    margin: float = Field(0.0, ge=0)
    """Largest difference that counts as equivalent, in the metric's unit."""


CLAUSE = re.compile(r"(not )?(better|worse|equivalent|diverges)(?: in (\S+))?(?: by more than (\S+))?")


class Clause(NamedTuple):
    """A part of confirmed_if or rejected_if."""

    negated: bool
    verdict: str
    study: str
    """Empty in a study's own questions."""
    than: str
    """The study in which the difference is smaller; empty without `by more than`."""


def clauses(text: str, where: str = "") -> list[Clause]:
    """The clauses of confirmed_if or rejected_if.

    Raises:
        ValueError: a part between commas is not a clause; the message starts with `where`.
    """
    found = []
    for part in text.split(","):
        match = CLAUSE.fullmatch(part.strip())
        if match is None:
            raise ValueError(
                f"{where}{text!r}: each clause between commas must be better, worse, equivalent or diverges, with "
                f"`not` before it to negate it, and with `in STUDY` after it in a comparison; better and worse may end "
                f"with `by more than STUDY`"
            )
        clause = Clause(bool(match[1]), match[2], match[3] or "", match[4] or "")
        if clause.than and clause.verdict not in ("better", "worse"):
            raise ValueError(f"{where}{text!r}: `by more than` goes with better and worse, not with {clause.verdict}")
        found.append(clause)
    return found


class Question(Section):
    """A claim that a study decides."""

    id: str
    claim: str
    contrast: list[str] = Field(default_factory=list)
    """Two arms; the second is the reference. `adamw_*` stands for the best of the matching arms; the test
    pays for the choice. With `target`: one arm."""
    target: float | None = None
    """A number for one arm's mean: the claim is that it is at most this, or at least this where higher is better."""
    level: float | None = Field(None, gt=0, lt=0.5)
    """Largest p that confirms or rejects a target. Default: 0.05."""
    metric: Metric | None = None
    """Default: the study's metric."""
    confirmed_if: str = ""
    """The verdicts that together confirm the claim: "better", "not worse", "diverges"; in a comparison "better in A,
    not better in B", "worse in A by more than B" (in margins: tested to differ, and by one or more as measured), or
    "frontier differs": an arm saves time or memory in one study and not in the other."""
    rejected_if: str = ""
    """The verdicts of which any rejects the claim. Default: the opposite of any verdict that confirms it."""
    least_speedup: float | None = Field(None, gt=0)
    """For "frontier differs": the smallest gain in speed that counts, as a share; default 0.02."""
    least_memory: float | None = Field(None, gt=0)
    """The same of memory."""

    @model_validator(mode="after")
    def _consistent(self) -> Question:
        if self.target is not None:
            return self._with_target()
        if self.level is not None:
            raise ValueError(f"question {self.id}: level = {self.level}: belongs with target")
        if not self.confirmed_if:
            raise ValueError(f"question {self.id}: confirmed_if is missing")
        if self.confirmed_if == FRONTIER_DIFFERS:
            return self
        for key in ("least_speedup", "least_memory"):
            if getattr(self, key) is not None:
                raise ValueError(f"question {self.id}: {key} goes with confirmed_if = {FRONTIER_DIFFERS!r} only")
        if len(set(self.contrast)) != 2 or len(self.contrast) != 2:
            raise ValueError(f"question {self.id}: contrast = {self.contrast}: must name two arms")
        for text in filter(None, (self.confirmed_if, self.rejected_if)):
            clauses(text, f"question {self.id}: ")
        return self

    def _with_target(self) -> Question:
        if len(self.contrast) != 1:
            raise ValueError(f"question {self.id}: contrast = {self.contrast}: must name one arm, for its target")
        if self.confirmed_if or self.rejected_if:
            raise ValueError(f"question {self.id}: target and level say when it is confirmed; remove confirmed_if")
        return self

    @property
    def asked(self) -> list[Clause]:
        """The clauses of confirmed_if and rejected_if."""
        confirming = [] if self.confirmed_if in ("", FRONTIER_DIFFERS) else clauses(self.confirmed_if)
        return confirming + (clauses(self.rejected_if) if self.rejected_if else [])


def arms_like(arms: Iterable[str], pattern: str) -> list[str]:
    """The arms that a name or a pattern such as `adamw_*` stands for; the name of an arm stands for that arm alone."""
    known = list(arms)
    return [pattern] if pattern in known else fnmatch.filter(known, pattern)


def _unique_ids(questions: list[Question]) -> None:
    ids = [question.id for question in questions]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ValueError(f"two questions have the same id: {', '.join(twice)}")


class Default(Section):
    """A rule, stated before the runs, that chooses the default arm.

    The incumbent stays unless another arm is better than it (by the study's metric, after Holm over the candidates)
    and trains in no more time than `time_of`. The best of such arms is chosen.
    """

    incumbent: str
    among: list[str] = Field(min_length=1)
    """The candidates that may replace the incumbent."""
    time_of: str = ""
    """The arm whose training time a candidate may exceed by at most 2%. Default: the incumbent."""


class Arm(Section):
    """A named set of overrides of the study's recipe."""

    group: Literal["core", "extended"] = "core"
    """Extended arms start after the core arms have passed the sanity gate."""
    note: str = ""
    """One line for tables."""
    measured: str = ""
    """Where its runs were measured, if not by gptlab, which then never trains it; such an arm has no settings."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Nested settings, as in a recipe file."""

    @model_validator(mode="after")
    def _consistent(self) -> Arm:
        if self.measured and self.settings:
            raise ValueError(f"measured = {self.measured}: an arm that was measured elsewhere has no settings")
        return self


class Study(Section):
    """A recipe, its arms, its seeds, and the questions asked of them; `load_study` reads a study."""

    name: str
    description: str = ""
    recipe: dict[str, Any]
    """The settings that all arms share."""
    arms: dict[str, Arm] = Field(min_length=1)
    flags: dict[str, Any] = Field(default_factory=dict)
    """Settings of the command line; they replace the arms' settings."""
    seeds: list[Int] = Field(default=[0, 1, 2], min_length=1)
    baseline: str
    """The arm that the other arms are compared with. Of a factorial: the name of the arm with all factors off."""
    factors: dict[str, Factor] = Field(default_factory=dict)
    """On/off changes whose combinations are the arms."""
    fraction: Int = 1
    """Of a factorial, train one in so many of its combinations."""
    ladder: Ladder | None = None
    """Sizes and budgets at which every arm is trained."""
    metric: Metric = Metric()
    variances: Literal["shrunk", "own", "shared"] = "shrunk"
    """What a comparison's variance rests on: its own seeds; those shrunk toward the other arms' variances; or one
    variance that all arms share, unless their noise turns out to differ."""
    questions: list[Question] = Field(default_factory=list)
    default: Default | None = None
    until_decided: bool = False
    """Seeds are added where a comparison is open, with a look after each; p and intervals pay for the looks."""
    most_seeds: Int = Field(12, ge=3)
    """If until_decided: seeds of an arm at most, and looks that are paid for."""
    targets: list[float] = Field(default_factory=list)
    """Validation losses for which the report gives each arm's steps, tokens and seconds."""

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        self._check_factors()
        self._check_ladder()
        if self.baseline not in self.arms:
            raise ValueError(f"baseline = {self.baseline}: must be one of the arms {', '.join(self.arms)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {self.seeds}: contains a seed twice")
        if self.until_decided and len(self.seeds) > self.most_seeds:
            raise ValueError(f"most_seeds = {self.most_seeds}: must be at least {len(self.seeds)}, the number of seeds")
        if self.until_decided and self.measured:
            raise ValueError(f"until_decided adds seeds, and {self.measured[0]} was measured elsewhere: leave it out")
        self._check_names()
        _unique_ids(self.questions)
        for question in self.questions:
            for arm in question.contrast:
                if not arms_like(self.arms, arm):
                    raise ValueError(f"question {question.id}: there is no arm {arm!r}")
                if question.target is not None and arm not in self.arms:
                    text = f"contrast = {question.contrast}: must name one arm, for its target"
                    raise ValueError(f"question {question.id}: {text}")
            if question.confirmed_if == FRONTIER_DIFFERS or any(c.study or c.than for c in question.asked):
                raise ValueError(f"question {question.id}: {question.confirmed_if!r} belongs in a comparison")
        if self.default is not None:
            for arm in (self.default.incumbent, *self.default.among, self.default.time_of or self.baseline):
                if arm not in self.arms:
                    raise ValueError(f"default: there is no arm {arm!r}")
        return self

    @property
    def measured(self) -> list[str]:
        """The arms that were measured elsewhere."""
        return [name for name, arm in self.arms.items() if arm.measured]

    def _check_names(self) -> None:
        """The study and its arms name folders."""
        for what, name in (("name", self.name), *(("arm", arm) for arm in self.arms)):
            plain = name.partition("@")[0] if self.ladder and what == "arm" else name  # a rung is checked already
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+=,-]*", plain):
                raise ValueError(f"{what} {name!r}: must consist of letters, digits and _ . + = , -")

    def _check_factors(self) -> None:
        """Each arm of a factorial must have the settings of the factors in its name, and no others."""
        if self.fraction != 1 and not self.factors:
            raise ValueError(f"fraction = {self.fraction}: needs [factors.NAME] tables, of which it trains a part")
        for arm in self.arms if self.factors else ():
            on = factors_on(arm, self.baseline)
            known = all(name in self.factors for name in on)
            if not known or self.arms[arm].settings != merged(*(self.factors[name].settings for name in on)):
                raise ValueError(
                    f"arm {arm}: a study with [factors] makes its own arms, and has no others; remove [arms], "
                    "or remove [factors]"
                )

    def _check_ladder(self) -> None:
        """Each arm of a ladder must be one of its rungs."""
        if self.ladder is None:
            return
        for arm in self.arms:
            if arm.rpartition("@")[2] not in self.ladder.rungs:
                raise ValueError(f"arm {arm}: is at no rung of [ladder], which makes {', '.join(self.ladder.rungs)}")
        bases = {arm.rpartition("@")[0] for arm in self.arms}
        if missing := [
            arm for base in bases for rung in self.ladder.rungs if (arm := f"{base}@{rung}") not in self.arms
        ]:
            raise ValueError(f"arm {missing[0]}: is missing; [ladder] has every arm at every rung")
        if self.until_decided:
            raise ValueError("until_decided adds seeds to some arms, and a ladder has the same seeds at every rung")

    def reference(self, arm: str) -> str:
        """The arm that an arm is compared with: the baseline, in a ladder the baseline at the same rung."""
        if self.ladder is None:
            return self.baseline
        return self.ladder.at_rung(arm, self.ladder.place(self.baseline)[0])

    def trunk(self, arm: str) -> tuple[str, int] | None:
        """The arm off which the runs of an arm branch, and at which step; None if they do not."""
        if self.ladder is None or not (trunk := self.ladder.trunk(arm)):
            return None
        step = branch_step(self._plain(arm, 0))
        return (trunk, step) if step else None

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """What repr and print show; `to_toml` writes all."""
        more = [f"and {len(self.arms) - MOST_ARMS} more"] if len(self.arms) > MOST_ARMS else []
        yield "name", self.name
        yield "arms", [*list(self.arms)[:MOST_ARMS], *more]
        yield "baseline", self.baseline
        yield "seeds", self.seeds
        yield "metric", self.metric.name
        yield "questions", [question.id for question in self.questions]

    def build(self, arm: str, seed: int) -> Recipe:
        """The recipe of a run. Raises ConfigError, which names the arm, if the settings are not valid."""
        recipe = self._plain(arm, seed)
        if self.ladder is None or not self.ladder.branch or self.ladder.trunk(arm):
            return recipe
        try:
            steps = {branch_step(self._plain(other, seed)) for other in self.ladder.budgets(arm)[:-1]} - {0}
        except ConfigError as error:
            raise ConfigError(f"study {self.name}, arm {arm}: {error}") from None
        return recipe.replace({"checkpoint.at": sorted({*recipe.checkpoint.at, *steps})})

    def _plain(self, arm: str, seed: int) -> Recipe:
        """The recipe of a run without what its branches need."""
        own = {"name": f"{self.name}/{arm}", "seed": seed}
        try:
            recipe = build_recipe(self.recipe, self.arms[arm].settings, self.flags, own)
            if recipe.precision.regime == "auto":
                raise ConfigError(
                    "precision.regime = auto: the runs of a study have the same regime on every machine; write the one "
                    'that is meant, such as precision.regime = "fp32" or "amp_bf16"'
                )
            return recipe
        except ConfigError as error:
            raise ConfigError(f"study {self.name}, arm {arm}: {error}") from None

    def beaten(self) -> list[tuple[str, str]]:
        """The (arm, setting) pairs where a flag replaces the arm's value by a different one."""
        flags = dict(_flat(nested(self.flags)))
        return [
            (arm, key)
            for arm, part in self.arms.items()
            for key, value in _flat(nested(part.settings))
            if key in flags and flags[key] != value
        ]

    def to_toml(self) -> str:
        """The study as a file that contains its recipe, so that later versions of the recipe change nothing."""
        content = self.model_dump(
            exclude={"arms"} if self.factors else {"arms", "factors", "fraction"}, exclude_none=True
        )
        content["arms"] = {
            name: {
                **{key: value for key, value in arm.model_dump(exclude={"settings"}).items() if value or key == "note"},
                **nested(arm.settings),
            }
            for name, arm in self.arms.items()
        }
        if self.factors:
            content["factors"] = {n: {"note": f.note, **nested(f.settings)} for n, f in self.factors.items()}
        return tomli_w.dumps(content)


def _flat(layer: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The (dotted name, value) pairs of a nested layer."""
    for key, value in layer.items():
        if isinstance(value, Mapping) and prefix + key != "data.mixture":
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def load_study(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """Read a study by shipped name or path, and validate the recipes of all its runs.

    >>> load_study("architecture-smoke").baseline
    'classic'

    In a study file, `recipe` is a recipe's name, path or settings; `settings` are overrides for all arms; an arm's
    table has settings besides `group`, `note` and `measured`. `arms_of = "STUDY"` takes arms, baseline and questions of
    another study and adds the file's own arms to them. `[factors.NAME]` tables, with settings for where the factor is
    on, make the arms of a factorial; `fraction` trains a part of it, and `baseline` names the arm with every factor
    off. `[ladder]` makes of each arm one for each size and budget.

    Args:
        name_or_path: a name that `gptlab studies` lists, or a path to a TOML file.
        overrides: dotted names to values, as on the command line; they replace the arms' settings.

    Raises:
        ConfigError: an unknown study, recipe or setting, or a value out of bounds; names the arm if an arm is wrong.
    """
    content = read_layer(name_or_path, "studies")
    where = f"study {content['name']}"
    for key in ("arms", "factors", "settings", "flags"):
        if not isinstance(content.get(key, {}), dict):
            raise ConfigError(f"{where}: {key} = {content[key]}: must be a table")
    if "arms_of" in content:
        content = _inherited(content, where)
    if "recipe" not in content:
        raise ConfigError(f"{where}: recipe is missing: a recipe's name or path, or a table of settings")
    base = content["recipe"]
    try:
        recipe = merged(base if isinstance(base, dict) else read_layer(base), content.pop("settings", {}))
        content["recipe"] = {k: v for k, v in recipe.items() if k not in ("name", "description", "seed")}
        build_recipe(content["recipe"])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if content.get("ladder") is not None:
        for name, arm in content.get("arms", {}).items():
            _arm_table(arm, f"{where}, arm {name}")
        content = expanded(content, where)
    if content.get("factors"):
        content = _with_factors(content, where)
    if not content.get("arms"):
        raise ConfigError(f"{where}: has no arms; add a table [arms.NAME] with the settings of each arm")
    arms: dict[str, Any] = {}
    for name, arm in content["arms"].items():
        own = dict(_arm_table(arm, f"{where}, arm {name}"))
        about = {key: own.pop(key) for key in ("group", "note", "measured") if key in own}
        arms[name] = {**about, "settings": own}
    content["arms"] = arms
    content["flags"] = merged(content.get("flags", {}), parse_flags(overrides))
    study = validated(Study, content, f"{where}: ")
    for arm in study.arms:
        study.build(arm, study.seeds[0])
    return study


def _arm_table(arm: Any, where: str) -> dict[str, Any]:
    """An arm as its file has it. Raises ConfigError if it is not a table, or sets what all arms share."""
    if not isinstance(arm, dict):
        raise ConfigError(f"{where}: is {arm!r} and must be a table of settings")
    for key in ("name", "description", "seed"):
        if key in arm:
            raise ConfigError(f"{where}: sets {key}, which an arm cannot; all arms have the seeds of the study")
    return arm


def _with_factors(content: dict[str, Any], where: str) -> dict[str, Any]:
    """A study file with the arms of its factorial. Arms that it already has, as a study's folder does, stay."""
    factors, set_by = {}, dict[str, str]()
    for name, table in content["factors"].items():
        own = dict(_arm_table(table, f"{where}, factor {name}"))
        note, own = own.pop("note", ""), nested(own)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ConfigError(f"{where}: factor {name!r}: must consist of letters, digits and _ . -")
        if not own:
            raise ConfigError(f"{where}, factor {name}: has no settings; add those that hold where it is on")
        for key, _ in _flat(own):
            if key in set_by:
                raise ConfigError(f"{where}: the factors {set_by[key]} and {name} both set {key}; one of them may")
            set_by[key] = name
        try:
            changed = build_recipe(content["recipe"], own) != build_recipe(content["recipe"])
        except ConfigError as error:
            raise ConfigError(f"{where}, factor {name}: {error}") from None
        if not changed:
            raise ConfigError(f"{where}, factor {name}: changes nothing; the recipe has these settings already")
        factors[name] = {"note": note, "settings": own}
    baseline = content.get("baseline", "none")
    try:
        combinations = two_level_design(list(factors), content.get("fraction", 1))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if not isinstance(baseline, str) or set(baseline.split("+")) <= set(factors):
        raise ConfigError(f"{where}: baseline = {baseline}: of a factorial, it names the arm with every factor off")
    made = {"+".join(on) or baseline: merged(*(factors[name]["settings"] for name in on)) for on in combinations}
    return {**content, "baseline": baseline, "factors": factors, "arms": content.get("arms") or made}


def _inherited(content: dict[str, Any], where: str) -> dict[str, Any]:
    """A study file with the arms, baseline, questions, metric, variances, seeds and default of the one in `arms_of`."""
    other = read_layer(content.pop("arms_of"), "studies")
    if "arms_of" in other:
        raise ConfigError(f"{where}: arms_of = {other['name']}: has the arms of {other['arms_of']}; name that study")
    arms = dict(other.get("arms", {}))
    for name, arm in content.get("arms", {}).items():
        arms[name] = merged(arms.get(name, {}), _arm_table(arm, f"{where}, arm {name}"))
    keys = ["baseline", "questions", "metric", "variances", "seeds", "default", "until_decided", "most_seeds"]
    keys += ["factors", "fraction", "targets", "ladder"]
    return {**{key: other[key] for key in keys if key in other}, **content, "arms": arms}


class Control(Section):
    """A study with the learning rate of the other study, to see whether a flip comes from the learning rate."""

    of: str
    """The study that it replaces."""
    study: str


class Comparison(Section):
    """Two studies of the same arms, and the questions asked of both; `load_comparison` reads a comparison."""

    name: str
    description: str = ""
    compare: list[str] = Field(min_length=2, max_length=2)
    """Names of the studies."""
    control: Control | None = None
    questions: list[Question] = Field(default_factory=list)

    @model_validator(mode="after")
    def _consistent(self) -> Comparison:
        first, second = self.compare
        if first == second:
            raise ValueError(f"compare = {self.compare}: must name two different studies")
        if self.control and self.control.of not in self.compare:
            raise ValueError(f"control.of = {self.control.of}: must be one of {first}, {second}")
        if self.control and self.control.study in self.compare:
            raise ValueError(f"control.study = {self.control.study}: must differ from {first} and {second}")
        _unique_ids(self.questions)
        for question in self.questions:
            if question.target is not None:
                raise ValueError(f"question {question.id}: target = {question.target}: belongs in a study")
            for clause in question.asked:
                if clause.study not in self.compare:
                    ends = f"each clause must end with `in {first}` or `in {second}`"
                    raise ValueError(f"question {question.id}: {question.confirmed_if!r}: {ends}")
                if clause.than and {clause.study, clause.than} != {first, second}:
                    other = second if clause.study == first else first
                    ends = f"must be `in {clause.study} by more than {other}`"
                    raise ValueError(f"question {question.id}: {question.confirmed_if!r}: {ends}")
        return self


def load_comparison(name_or_path: str | Path) -> Comparison:
    """Read a comparison of studies by shipped name or path.

    Raises:
        ConfigError: there is no such file, or something in it is wrong.
    """
    content = read_layer(name_or_path, "comparisons")
    return validated(Comparison, content, f"comparison {content['name']}: ")
