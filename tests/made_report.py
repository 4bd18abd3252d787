"""A report to show: two studies of nineteen arms by three seeds, as `analyse` makes it from runs."""

import copy
import json
import random
import re

EVIL = "<img src=x onerror=alert(1)>"
ENDS = "</script><script>alert(2)</script><!-- \u2028 &amp; {{style}} \\u003c"

ARMS = {  # name: (group, loss added, speed over fp32, memory over fp32, micro-F1 added)
    "fp32_baseline": ("core", 0.0, 1.0, 1.0, 0.0),
    "amp_fp16": ("core", 0.003, 3.44, 0.65, -0.001),
    "amp_bf16": ("core", 0.004, 3.48, 0.65, -0.001),
    "bf16_pure": ("core", 0.052, 3.90, 0.50, 0.010),
    "fp16_naive": ("extended", 0.3, 3.9, 0.50, -0.2),
    "fp16_naive_foreach": ("extended", 0.5, 3.9, 0.50, -0.2),
    "bf16_naive": ("extended", 0.052, 3.88, 0.50, 0.010),
    "amp_fp16_8bit_adam": ("extended", 0.048, 3.31, 0.62, -0.014),
    "amp_bf16_8bit_adam": ("extended", 0.055, 3.42, 0.63, -0.016),
    "bf16_no_compile": ("extended", 0.051, 2.70, 0.61, 0.010),
    "fp32_tf32_matmul": ("extended", 0.001, 1.92, 1.0, 0.0),
    "amp_bf16_fp32_head": ("extended", -0.002, 2.95, 0.72, 0.009),
    "bf16_body_fp32_head": ("extended", 0.021, 3.22, 0.58, 0.012),
    "bf16_stochastic_rounding": ("extended", 0.010, 3.61, 0.50, -0.003),
    "bf16_kahan": ("extended", 0.006, 3.55, 0.56, -0.002),
    "bf16_fp32_norms": ("extended", 0.040, 3.70, 0.51, 0.004),
    "fp8_tensorwise": ("extended", 0.031, 3.95, 0.61, -0.008),
    "fp8_rowwise": ("extended", 0.024, 3.72, 0.61, -0.006),
    "amp_bf16_bf16_loss": ("extended", 0.015, 3.52, 0.58, -0.004),
}
LM = {
    "description": "Precision regimes on language modelling: GPT-2 124M, OpenWebText, 10,000 steps",
    "unit": "tokens",
    "columns": [{"key": "val_perplexity", "label": "perplexity"}],
    "metric": {
        "key": "final_val_loss",
        "label": "validation loss, nats",
        "better": "lower",
        "margin": 0.02,
        "margin_from": "stated by the study",
    },
}
CLASSIFY = {
    "description": "Precision regimes on classification: RoBERTa-base with a linear head, EURLEX57K",
    "unit": "samples",
    "columns": [],
    "metric": {
        "key": "micro_f1",
        "label": "micro-F1",
        "better": "higher",
        "margin": 0.005,
        "margin_from": "twice the noise between the baseline's seeds",
    },
}


def mean_sd(values: list[float]) -> dict:
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return {"n": 1, "mean": mean, "sd": None, "low": None, "high": None}
    sd = (sum((value - mean) ** 2 for value in values) / (n - 1)) ** 0.5
    half = {2: 8.98, 3: 2.48}.get(n, 1.4) * sd  # Student's t over the root of n
    return {"n": n, "mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


def make_study(name: str, task: str, arms: dict, seeds: int, points: int, draw: random.Random) -> dict:
    runs = len(arms) * seeds
    study = {
        "name": name,
        "task": task,
        "folder": f"results/{name}",
        "baseline": next(iter(arms)),
        "inference": None,
        "elsewhere": False,
        "paired": True,
        "groups": None,
        "seeds": list(range(seeds)),
        "most_seeds": None,
        "runs_planned": runs,
        "runs_found": runs,
        "arms": [],
        "failures": [],
        "runs": [],
        "means": {},
        **copy.deepcopy(LM if task == "lm" else CLASSIFY),
    }
    study["columns"].append({"key": "wall_seconds", "label": "wall time, s"})
    noise = [draw.gauss(0, 1) for _ in range(seeds)]  # what a seed does to all arms alike
    base: dict[str, float] = {}
    for arm, plan in arms.items():
        runs, values = [], {}
        for seed in range(seeds):
            diverges = arm == "fp16_naive_foreach" or (arm == "fp16_naive" and seed > 0)
            runs.append(make_run(study, arm, seed, plan[1], diverges, points, draw))
            if not diverges and task == "lm":
                values[str(seed)] = 2.95 + plan[1] + 0.02 * noise[seed] + draw.gauss(0, 0.004)
            elif not diverges:
                values[str(seed)] = 0.70 + plan[4] + 0.006 * noise[seed] + draw.gauss(0, 0.001)
        base = base or values
        study["runs"] += runs
        completed = [run for run in runs if run["status"] == "completed"]
        if completed:
            study["means"][arm] = {kind: mean_curve([run[kind] for run in completed]) for kind in ("train", "val")}
        study["arms"].append(make_arm(study, arm, plan, values, base, len(runs) - len(completed), draw))
    return study


def make_run(study: dict, arm: str, seed: int, loss: float, diverges: bool, points: int, draw: random.Random) -> dict:
    last = 10_000
    ended = last if not diverges else 1 if arm == "fp16_naive_foreach" else draw.randrange(900, 4000)
    steps = [round(1 + (last - 1) * i / max(1, points - 1)) for i in range(points)]
    smooth = {step: 2.95 + loss + 7.9 / (1 + step / 70) ** 0.9 for step in steps if step <= ended}
    train = [[step, value + draw.gauss(0, 0.05)] for step, value in smooth.items()]
    few = [step for step in smooth if steps.index(step) % max(1, points // 40) == 0]
    val = [[step - 1, smooth[step] + 0.02 + draw.gauss(0, 0.006)] for step in few]
    if diverges:
        train += [[ended + 10 * k, 3.4 + 0.7 * k * k] for k in range(1, 5)] + [[ended + 50, None]]
        spike = f"the training loss rose from 3.41 to 68.8 at step {ended} and stayed up for 39 steps"
        broken = "the update of step 1 left weight wte.weight not finite: the training loss is nan at step 2"
        study["failures"].append(
            {
                "arm": arm,
                "seed": seed,
                "status": "diverged",
                "step": ended + 50,
                "failure": "spike" if ended > 1 else "non_finite",
                "tensor": None if ended > 1 else "weight wte.weight",
                "reason": spike if ended > 1 else broken,
            }
        )
    return {
        "arm": arm,
        "seed": seed,
        "status": "diverged" if diverges else "completed",
        "train": train,
        "val": val,
        "ended": ended + 50 if diverges else None,
        "folder": f"{study['folder']}/{arm}_seed{seed}",
    }


def mean_curve(curves: list[list]) -> list:
    return [[at[0][0], sum(loss for _, loss in at) / len(at)] for at in zip(*curves, strict=True)]


def make_arm(study: dict, name: str, plan: tuple, values: dict, base: dict, diverged: int, draw) -> dict:
    group, _, speed, memory, _ = plan
    first, planned = name == study["baseline"], len(study["seeds"])
    rate = speed * (18_200 if study["task"] == "lm" else 48)
    other = {"wall_seconds": mean_sd([33_758 / speed + draw.gauss(0, 40) for _ in range(3)])}
    if values and study["task"] == "lm":
        other["val_perplexity"] = mean_sd([2.718281828**value for value in values.values()])
    statuses = {"completed": planned - diverged, "diverged": diverged}
    return {
        "name": name,
        "group": group,
        "planned": planned,
        "values": values,
        "settings": {"precision.regime": name},
        "note": "the reference: float32 throughout, TF32 off" if first else "autocast to bfloat16, the rest in float32",
        "statuses": {status: count for status, count in statuses.items() if count},
        "quality": mean_sd(list(values.values())) if values else None,
        "throughput": {"value": rate, "low": rate * 0.97, "high": rate * 1.03, "n": 3, "of": "runs"},
        "speedup": None if first else {"value": speed, "low": speed - 0.1, "high": speed + 0.1, "n": 3, "of": "seeds"},
        "memory_gb": {"mean": 40.9 * memory, "n": 3},
        "memory_ratio": memory,
        "other": other,
        "frontier": None if diverged else round(draw.random(), 3),
        "comparison": None if first else compare(study, values, base, diverged, planned),
    }


def compare(study: dict, values: dict, base: dict, diverged: int, planned: int) -> dict:
    pairs = [values[seed] - base[seed] for seed in values if seed in base]
    found = mean_sd(pairs) if pairs else dict.fromkeys(("mean", "sd", "low", "high")) | {"n": 0}
    margin, sign = study["metric"]["margin"], -1 if study["metric"]["better"] == "lower" else 1
    verdict, text = "not resolved", "; detectable with 80% power from 3 seeds: 0.05; 5 more seeds would resolve it"
    if found["low"] is not None:
        low, high = sorted((sign * found["low"], sign * found["high"]))
        if abs(found["mean"]) > margin and (low > 0 or high < 0):
            verdict = "better" if low > 0 else "worse"
        elif -margin < low and high < margin:
            verdict = "equivalent"
        numbers = f"{found['mean']:+.3g} [{found['low']:+.3g}, {found['high']:+.3g}] over {found['n']} seeds"
        text = f"{numbers}, p = 0.012 after Holm over 18" + (text if verdict == "not resolved" else "")
    if diverged:
        verdict, text = "diverges", f"{diverged} of {planned} runs diverged"
    return found | {
        "verdict": verdict,
        "text": f"{verdict}: {text}",
        "p": 0.01,
        "p_holm": 0.012,
        "p_equivalent": 0.4,
        "mde": 0.05,
        "more_seeds": 5,
        "welch": None,
        "why": "",
    }


def ask(name: str, answer: str, claim: str, text: str, *evidence: str) -> dict:
    said = {"sentence": f"What was found on {name}, in plain words.", "cost": "It costs 1.1 times the memory."}
    said |= {"change": "2 more seeds would settle it.", "text": text, "comparisons": []}
    return {"id": name, "answer": answer, "claim": claim, **said, "evidence": list(evidence), "contrast": []}


def make_payload(arms: dict | None = None, seeds: int = 3, points: int = 300, studies: int = 2) -> dict:
    """A payload as `analysis` makes it, from planted differences and a fixed draw."""
    draw, arms = random.Random(4), arms or ARMS
    named = [("precision-lm", "lm"), ("precision-cls", "classify")][:studies]
    made = [make_study(name, task, arms, seeds, points, draw) for name, task in named]
    for study in made:
        study["questions"] = [
            ask(
                "H1",
                "confirmed",
                "a float32 head does not help language modelling",
                "equivalent: -0.006 [-0.011, -0.001] nats over 3 seeds, within the margin of 0.02 (p = 0.004)",
                "amp_bf16_fp32_head",
                "amp_bf16",
            ),
            ask(
                "H2",
                "confirmed",
                "float16 without loss scaling diverges",
                "diverges: 2 of 3 runs diverged",
                "fp16_naive",
            ),
            ask(
                "H3",
                "rejected",
                "8-bit moments cost quality",
                "equivalent: +0.003 [-0.002, +0.008] nats over 3 seeds",
                "amp_bf16_8bit_adam",
                "amp_bf16",
            ),
            ask(
                "H4",
                "not resolved",
                "the frontier has the same arms on both tasks",
                "not resolved: fp8_tensorwise differs by 31% [-4%, 66%]; 6 more seeds would resolve it",
                "fp8_tensorwise",
            ),
        ]
        study["summary"] = f"Of {len(arms) - 1} arms compared with the baseline, most are open."
        study["recommendations"] = [
            {
                "id": "overall",
                "evidence": ["amp_bf16", "fp32_baseline"],
                "text": "for language modelling on one H100: "
                "amp_bf16, 3.48 times as fast as fp32_baseline and equivalent within 0.02",
            },
            {"id": "H1", "text": "no arm is recommended: an fp32 head is equivalent and slower", "evidence": []},
        ]
        study["provenance"] = {
            "hardware": ["NVIDIA H100 80GB HBM3"],
            "commits": ["560430dfdf0e7268f60f3a952704f76180dc18b4"],
            "versions": {"gptlab": ["0.1.0"], "torch": ["2.13.0+cu128"], "python": ["3.11.7"], "cuda": []},
            "command": f"gptlab study run {study['name']}",
            "flags": "",
            "recipe": "[model]\nn_layer = 12\nn_head = 12\nn_embd = 768\n\n[optim]\nlr = 0.0006\nbetas = [0.9, 0.95]\n",
            "overrides": {arm: f'[precision]\nregime = "{arm}"\n' for arm in arms},
        }
    return {
        "title": " and ".join(study["name"] for study in made),
        "gptlab": "0.1.0",
        "studies": made,
        "command": f"gptlab study report {' '.join(study['folder'] for study in made)}",
        "warnings": [
            "precision-lm: runs differ in their commit: 560430dfdf0e (48 runs), 4675ceb00a11 (9 runs)",
            "precision-cls: three seeds; nothing below 0.03 in micro-F1 can be told apart",
        ],
        "across": make_across(made) if studies == 2 else None,
    }


def make_across(studies: list[dict]) -> dict:
    names, places = [arm["name"] for arm in studies[0]["arms"]], []
    for study in studies:
        sign = 1 if study["metric"]["better"] == "lower" else -1
        judged = [arm for arm in study["arms"] if not arm["statuses"].get("diverged")]
        order = sorted(judged, key=lambda arm: sign * arm["quality"]["mean"])
        places.append({arm["name"]: place + 1 for place, arm in enumerate(order)})
    flipped = [("amp_bf16_8bit_adam", "bf16_pure"), ("bf16_body_fp32_head", "amp_fp16_8bit_adam")]
    flips = [
        {
            "arm": arm,
            "reference": other,
            "verdict": "flips" if (arm, other) in flipped else "unresolved",
            "p_interaction": 0.0002 if (arm, other) in flipped else 0.6,
            "text": "precision-lm: -0.0411 [-0.0533, -0.0289]; precision-cls: +0.0262 [+0.021, +0.0314]",
        }
        for i, arm in enumerate(names)
        for other in names[:i]
    ]
    return {
        "name": "precision",
        "description": "The same regimes on two tasks",
        "flips": flips,
        "studies": [study["name"] for study in studies],
        "ranking": {
            "tau": 0.31,
            "low": -0.12,
            "high": 0.66,
            "p": 0.09,
            "n": 17,
            "text": "Kendall's tau-b 0.31 [-0.12, 0.66] over 17 arms, p = 0.09 of no association",
        },
        "ranks": [
            {
                "arm": name,
                "ranks": [place.get(name, len(names) - 0.5) for place in places],
                "flip": any(name in pair for pair in flipped),
            }
            for name in names
        ],
        "questions": [
            ask(
                "H5",
                "rejected",
                "the ranking of regimes is the same on both tasks",
                "2 pairs flip: bf16_pure and amp_bf16_8bit_adam, bf16_body_fp32_head and amp_fp16_8bit_adam",
                "bf16_pure",
                "amp_bf16_8bit_adam",
            )
        ],
        "recommendations": [
            {
                "id": "overall",
                "evidence": ["bf16_pure", "bf16_body_fp32_head"],
                "text": "choose the "
                "regime for the task: bf16_pure wins on classification and loses on language modelling",
            }
        ],
    }


def small() -> dict:
    return make_payload({arm: ARMS[arm] for arm in ("fp32_baseline", "amp_bf16", "fp16_naive")}, points=30)


def evil() -> dict:
    """Texts that hold markup, and an arm whose name is nothing else."""

    def poison(value):
        if isinstance(value, dict):
            return {key: poison(one) for key, one in value.items()}
        if isinstance(value, list):
            return [poison(one) for one in value]
        free = isinstance(value, str) and re.search(r"[ /]", value) and value not in (EVIL, "not resolved")
        return value + EVIL + ENDS if free else value

    return poison(json.loads(json.dumps(small()).replace("amp_bf16", EVIL)))
