"""The arms of the study precision-lm on one GPU: is each in the precision it says, how fast is it, in how much memory.

GPT-2 124M in batches of 12 x 1,024 x 5, as the study has it, through the real training loop, each measurement in a
fresh process. In this order, until the time is up; the same call goes on from there, on a machine of the same kind:

    1. check: a block of every arm, eager: which dtypes are stored and multiplied, and is a matmul TF32
    2. every arm, 60 timed steps after ten untimed ones; fp32_baseline, the slowest, last
    3. the core arms, 300 timed steps
    4. the kernels that amp_bf16 and bf16_pure spend their time in, by torch.profiler
    5. the core arms and TF32 once more, in the opposite order: the spread between processes

    python benchmarks/precision_gpu.py --out results/precision_gpu.json        # again, until nothing is left
    python benchmarks/precision_gpu.py --out new.json --resume-from old.json   # what old.json has is taken over
    python benchmarks/precision_gpu.py --table results/precision_gpu.json      # as Markdown
    python benchmarks/precision_gpu.py --tiny --arms amp_bf16 bf16_pure --out /tmp/tiny.json --work /tmp/tiny

`--section.key value` changes a setting of all arms. gptlab is installed, or PYTHONPATH=src. The text is the standard
library's source in bytes, the vocabulary still 50,304: speed does not depend on it, and the loss can be seen to fall.
--work keeps that dataset and what was compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import machine, say

from gptlab.cli import lift_settings
from gptlab.config import Recipe, load_study
from gptlab.rundir import RunDir, write_atomically

STUDY = "precision-lm"
FP32, TF32 = "fp32_baseline", "fp32_tf32_matmul"
# Throughput over that of fp32_baseline, as the study's plan expects it: "rough expectations", each with a ~. Whether
# its float32 multiplies in TF32 the plan does not say, so the table has both.
PLAN = {"fp32_baseline": 1.0, "amp_bf16": 2.0, "bf16_pure": 2.1, "fp16_naive": 2.0}
PROFILED, PROFILED_STEPS, TOP_KERNELS = ("amp_bf16", "bf16_pure"), 3, 15
GRACE = 45  # seconds that a job has to end in when the time is up; then it is stopped, and the next call tries it again
ENDED = ("completed", "diverged", "out_of_memory", "not_applicable")  # not measured again
TINY = {
    "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 32, "model.block_size": 64, "model.vocab_size": 512,
    "batch.micro_batch": 4, "batch.tokens_per_step": 512, "schedule.warmup_steps": 2, "train.threads": 1,
}  # fmt: skip

Row = dict[str, Any]  # a job, and what came of it

# -- a job, in a process of its own; torch is imported here alone ---------------------------------------------------


def recipe_of(job: Row, arm: str) -> Recipe:
    """An arm's recipe: the study's, its schedule too, but of few steps and with next to no evaluation."""
    from gptlab.training.throughput import UNTIMED

    recipe = load_study(STUDY, job["settings"]).build(arm, seed=0)
    assert isinstance(recipe.batch.micro_batch, int)
    return recipe.replace({
        "data.corpus": "stdlib", "data.tokenizer": "byte", "data.path": job["data"],
        "train.max_steps": UNTIMED + job["timed"], "schedule.decay_steps": recipe.train.max_steps,
        "train.eval_every": 0, "eval.tokens": recipe.batch.micro_batch * recipe.model.block_size, "eval.train": False,
        "checkpoint.every": 0, "checkpoint.keep_best": False, "log.every": 10,
    })  # fmt: skip


def where(job: Row) -> Row:
    """What is measured on."""
    import torch

    from gptlab.training.setup import pick_device

    facts: Row = {"device": "CPU", "torch": torch.__version__, "cuda": torch.version.cuda}
    if pick_device(recipe_of(job, FP32).train.device).type == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        facts |= {"device": gpu.name, "gpu_gb": gpu.total_memory / 1e9, "capability": f"{gpu.major}.{gpu.minor}"}
    return facts


def float32_matmul(device: Any, tf32: bool) -> tuple[float, list[str]]:
    """|c - exact| / |exact| of a float32 product as this process multiplies it now, and what is wrong with that.

    TF32 keeps 10 bits of each factor and has some 3e-4, float32 stays under 1e-5. A CPU has no TF32 to tell.
    """
    import torch

    n = 2048 if device.type == "cuda" else 256
    a, b = torch.randn(2, n, n, generator=torch.Generator().manual_seed(0)).to(device)
    exact = a.double() @ b.double()
    error = ((a @ b - exact).norm() / exact.norm()).item()
    right = device.type != "cuda" or (5e-5 < error < 5e-3 if tf32 else error < 1e-5)
    return error, [] if right else [f"a float32 matmul has error {error:.1e}, not {'TF32' if tf32 else 'float32'}'s"]


def check(job: Row) -> Row:
    """One block of each arm forward and backward: are dtypes and matmul mode what its regime says?"""
    from gptlab.precision.regimes import NotApplicable

    row: Row = {"status": "failed", "arms": {}, "problems": []}
    for arm in job["arms"]:
        try:
            row["arms"][arm], problems = check_arm(recipe_of(job, arm).replace({"model.n_layer": 1}))
        except NotApplicable as error:
            row["arms"][arm], problems = {"reason": str(error)}, []
        except Exception as error:
            row["arms"][arm], problems = {}, [f"{type(error).__name__}: {error}"]
        row["problems"] += [f"{arm}: {problem}" for problem in problems]
        Path(job["answer"]).write_text(json.dumps(row))  # the next arm may take the process down
    return row | {"status": "completed"}


def check_arm(recipe: Recipe) -> tuple[Row, list[str]]:
    """What an arm stores and multiplies in, and in what that differs from its regime."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from gptlab.model.gpt import build_model
    from gptlab.precision.regimes import apply_regime, enter_regime
    from gptlab.training.setup import pick_device

    multiplied: set[torch.dtype] = set()

    class Multiplied(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            if name.endswith("mm") or ("attention" in name and "backward" not in name):  # it is given float32 sums, too
                parts = [getattr(arg, "_data", arg) for arg in args if isinstance(arg, torch.Tensor)]  # of torchao's
                multiplied.update(part.dtype for part in parts if part.is_floating_point())
            return func(*args, **(kwargs or {}))

    def names(dtypes: set[torch.dtype]) -> str:
        return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))

    device = pick_device(recipe.train.device)
    regime = enter_regime(recipe.precision, device)
    model = build_model(recipe.model, device, lay_out=lambda model: apply_regime(model, regime))
    tokens = torch.randint(recipe.model.vocab_size, (2, recipe.model.block_size + 1)).to(device)
    with Multiplied(), regime.context(device):
        model(tokens[:, :-1], tokens[:, 1:], None, torch.tensor(1 / tokens.numel())).train.backward()
    stored = {parameter.dtype for parameter in model.parameters()}
    float8 = {dtype for dtype in multiplied if "float8" in str(dtype)}
    weights, body = regime.weights, regime.autocast or regime.weights
    error, problems = float32_matmul(device, regime.tf32)
    if stored != (said := {weights, regime.head or weights, regime.norms or weights}):
        problems.append(f"stores {names(stored)}, not {names(said)}")
    if multiplied - float8 != (said := {body, regime.head or body}) or bool(float8) != bool(regime.float8):
        problems.append(f"multiplies in {names(multiplied)}, not {names(said)}{' and float8' * bool(regime.float8)}")
    return {"stored": names(stored), "multiplied": names(multiplied), "matmul_error": f"{error:.1e}"}, problems


def train(job: Row) -> Row:
    """Train an arm with `gptlab.train`; its stopwatch is listened to for single steps, energy and a profiler."""
    import torch

    from gptlab.precision.regimes import make_regime
    from gptlab.tasks import lm
    from gptlab.training import loop
    from gptlab.training.setup import pick_device
    from gptlab.training.throughput import UNTIMED, Energy, Stopwatch, percentile

    recipe, run = recipe_of(job, job["arm"]), RunDir(job["run"])
    device = pick_device(recipe.train.device)
    cuda, profiler, kernels = device.type == "cuda", None, []
    if job["kind"] == "profile":
        profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU],
            schedule=torch.profiler.schedule(wait=UNTIMED, warmup=1, active=PROFILED_STEPS, repeat=1),
            on_trace_ready=lambda profiler: kernels.extend(profiler.key_averages()),
        )

    class Heard(Stopwatch):
        last: Heard | None = None
        energy: Energy | None = None
        joules: float | None = None

        def step(self) -> None:
            super().step()
            if profiler is not None:
                if cuda:
                    torch.cuda.synchronize()  # so that a step's kernels are this step's
                profiler.step()

        def lap(self) -> float:
            mean, Heard.last = super().lap(), self  # every ten steps; the GPU has done them
            if self.energy is not None:
                self.joules = self.energy.joules()
            elif len(self.step_seconds) >= UNTIMED:
                self.energy = Energy(device)
            return mean

    def evaluate(*args: Any) -> Any:
        with torch.compiler.set_stance("force_eager"):  # compiling it would take as long as many steps
            return heldout_loss(*args)

    heldout_loss, lm.heldout_loss, loop.Stopwatch = lm.heldout_loss, evaluate, Heard
    shutil.rmtree(run.path, ignore_errors=True)
    with profiler or contextlib.nullcontext():
        row = loop.train(recipe, run.path, quiet=True).to_json()
    row |= {key: run.read_json("environment.json").get(key) for key in ("git_commit", "optimizer")}
    row["losses"] = [[line["step"], line["loss"]] for line in run.read_metrics() if line.get("loss") is not None]
    if row["status"] != "not_applicable":
        tf32 = make_regime(recipe.precision).tf32
        row["float32_matmul_error"], row["problems"] = float32_matmul(device, tf32)  # as the loop has left the process
    if Heard.last is not None:
        watch, times = Heard.last, Heard.last.steady()
        row["steady"] = "tokens_per_second" in row and len(watch.step_seconds) - len(times) >= UNTIMED
        row["step_ms"] = {f"p{share}": 1000 * percentile(times, share / 100) for share in (5, 25, 50, 75, 95)}
        row["first_step_seconds"] = watch.step_seconds[0]
        row["joules_per_step"] = watch.joules and watch.joules / (len(watch.step_seconds) - UNTIMED)
    if profiler is not None:
        spent = [
            {"kernel": kernel.key[:160], "calls": kernel.count / PROFILED_STEPS,
             "ms": (kernel.self_device_time_total if cuda else kernel.self_cpu_time_total) / 1000 / PROFILED_STEPS}
            for kernel in kernels
            if kernel.device_type.name == ("CUDA" if cuda else "CPU")  # else the calls that launch them, too
            and not (getattr(kernel, "is_user_annotation", False) or kernel.key.startswith("ProfilerStep"))
        ]  # fmt: skip
        row["kernels_ms"] = sum(kernel["ms"] for kernel in spent)
        row["kernels"] = sorted(spent, key=lambda kernel: -kernel["ms"])[:TOP_KERNELS]
    shutil.rmtree(run.path, ignore_errors=True)  # 1.5 GB of checkpoint
    return row


# -- jobs, one after another ----------------------------------------------------------------------------------------


def jobs_of(settings: Row, args: argparse.Namespace) -> list[Row]:
    """Everything there is to do, in order."""
    study = load_study(STUDY, settings)
    arms = sorted((arm for arm in study.arms if arm in (args.arms or study.arms)), key=lambda arm: arm == FP32)
    core = [arm for arm in arms if study.arms[arm].group == "core"]
    again = [arm for arm in arms if arm in core or arm == TF32]
    jobs = [("check", " ".join(arms), 0, 1), *(("time", arm, args.steps, 1) for arm in arms)]
    jobs += [("time", arm, args.long_steps, 1) for arm in core if args.long_steps]
    jobs += [("profile", arm, PROFILED_STEPS + 2, 1) for arm in PROFILED if arm in arms]
    jobs += [("time", arm, args.steps, n) for n in range(2, args.rounds + 1) for arm in again[:: 1 if n % 2 else -1]]
    return [
        {"kind": kind, "arm": arm, "timed": timed, "round": n, "settings": settings} for kind, arm, timed, n in jobs
    ]


def place(row: Row) -> tuple[str, str, str]:
    """What rows that are compared have in common."""
    return row["device"], row["torch"], json.dumps(row["settings"], sort_keys=True)


def identity(row: Row) -> tuple[Any, ...]:
    return *place(row), row["kind"], row["arm"], row["timed"], row["round"]


def expected_seconds(job: Row, rows: list[Row]) -> float:
    """How long a job will take, by what its arm took before, else by the longest like it; 0 where nothing is known."""
    like = [row for row in rows if place(row) == place(job) and row["kind"] == job["kind"]]
    mine = [row for row in like if row["arm"] == job["arm"] and "time_per_iter_ms" in row]
    more = [row["seconds"] + (job["timed"] - row["timed"]) * row["time_per_iter_ms"] / 1000 for row in mine]
    return min(more, default=max((row["seconds"] for row in like if row["timed"] == job["timed"]), default=0.0))


def launch(job: Row, folder: Path, seconds: float) -> Row:
    """Do a job in a fresh process: what it answered, or how it failed."""
    answer, log = folder / "answer.json", folder / f"{job['kind']}.log"
    answer.unlink(missing_ok=True)
    job = {**job, "answer": str(answer), "run": str(folder / "run"), "data": str(folder / "data")}
    python = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(python), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
    }  # fmt: skip
    began, code = time.monotonic(), None
    with open(log, "wb") as output:
        command = [sys.executable, __file__, "--worker", json.dumps(job)]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, process_group=0)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # those that compile for it, too
            process.wait()
    row = json.loads(answer.read_text()) if answer.is_file() else {}
    if code is None:
        row |= {"status": "timed_out", "reason": f"stopped after {seconds:.0f} s, as the time was up"}
    elif code:
        last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        row |= {"status": "failed", "reason": f"ended with {code}: {last}"}
    return row | {"seconds": time.monotonic() - began}


def measure(args: argparse.Namespace, settings: Row, rows: list[Row]) -> int:
    """Do what is not in `rows` yet while there is time, and write them after each job. Returns how many are left."""
    began, folder, call, left = time.monotonic(), args.work.resolve(), machine(), 0
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data" / "manifest.json").is_file():
        prepare = ["prepare", "stdlib", "--tokenizer", "byte", "--out", str(folder / "data")]
        subprocess.run([sys.executable, "-m", "gptlab", *prepare], check=True, stdout=subprocess.DEVNULL)
    here = launch({"kind": "where", "timed": 0, "settings": settings}, folder, args.budget_seconds)
    if "device" not in here:
        raise SystemExit(f"nothing to measure on: {here['reason']}")
    say(f"on {here}")

    def write() -> None:
        content = {"plan": PLAN, "last_call": call | here, "table": compare(rows), "rows": rows}
        write_atomically(args.out, json.dumps(content, indent=1) + "\n")

    args.out.parent.mkdir(parents=True, exist_ok=True)
    write()
    for job in jobs_of(settings, args):
        job |= {"device": here["device"], "torch": here["torch"]}
        if any(identity(row) == identity(job) and row["status"] in ENDED for row in rows):
            continue
        what = f"{job['kind']} {job['arm']}, {job['timed']} steps"
        remaining, expected = args.budget_seconds - (time.monotonic() - began), expected_seconds(job, rows)
        if remaining <= 0 or expected > remaining:
            say(f"{what}: left for another call ({max(0, remaining):.0f} s remain, {expected:.0f} s expected)")
            left += 1
            continue
        arms = {"arms": job["arm"].split()} if job["kind"] == "check" else {}
        row = job | launch(job | arms, folder, remaining + GRACE)
        left += row["status"] not in ENDED
        rows[:] = [*(old for old in rows if identity(old) != identity(row)), row]
        write()
        rate = f", {row['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in row else ""
        say("; ".join([f"{what}: {row['status']}{rate}, took {row['seconds']:.0f} s", *notes(row)]))
    return left


# -- the table ------------------------------------------------------------------------------------------------------


def notes(row: Row) -> list[str]:
    """What a reader of a row must know besides its numbers."""
    losses = [loss for _, loss in row.get("losses", [])]
    flat = row["kind"] == "time" and row["status"] == "completed" and not losses[-1] < losses[0]
    return [*["the loss did not fall"] * flat, *row.get("problems", []), *([row["reason"]] if "reason" in row else [])]


def compare(rows: list[Row]) -> list[Row]:
    """A line for each timed run, with its ratios to the two float32 arms on the same device, torch and settings.

    The reference has as many steps and is of the same round; where there is none, another is taken, and `other` names
    the ratio. A run that ended within its untimed steps has no ratio: it was compiling.
    """
    lines, timed = [], [row for row in rows if row["kind"] == "time"]
    for row in sorted(timed, key=lambda row: (*place(row), row["timed"], row["round"])):
        line = {key: row[key] for key in ("device", "torch", "settings", "arm", "timed", "round", "status")}
        for key in ("tokens_per_second", "step_ms", "peak_memory_gb", "joules_per_step", "steady", "failed_at_step"):
            line[key] = row.get(key)
        line |= {"loss": [loss for _, loss in row.get("losses", [])], "note": "; ".join(notes(row)), "other": []}
        for name, arm in (("x_fp32", FP32), ("x_tf32", TF32)) if row.get("steady") else ():
            peers = [peer for peer in timed if peer["arm"] == arm and peer.get("steady") and place(peer) == place(row)]
            beside = [peer for peer in peers if (peer["timed"], peer["round"]) == (row["timed"], row["round"])]
            if peers:
                line[name] = row["tokens_per_second"] / (beside or peers)[0]["tokens_per_second"]
                line["other"] += [] if beside else [name]
                if row["arm"] in PLAN:
                    line[f"{name}_of_plan"] = line[name] / PLAN[row["arm"]]
        lines.append(line)
    return lines


HEADING = ("arm", "steps", "tokens/s", "x fp32", "x TF32", "plan", "x fp32 / plan", "x TF32 / plan", "ms", "p5", "p95",
           "peak GB", "J a step", "loss", "status")  # fmt: skip
LEGEND = """x fp32, x TF32: tokens/s over those of fp32_baseline, of fp32_tf32_matmul; * where it had other steps or is
of another round. plan: what the study's plan expects over its fp32_baseline; x / plan: what was measured over that.
(tokens/s): the run ended while it compiled and warmed up. ms: the median step, with the 5th and 95th percentile."""


def cells(line: Row) -> list[str]:
    def number(key: str, form: str, within: Row = line) -> str:
        return "" if within.get(key) is None else f"{within[key]:{form}}" + "*" * (key in line["other"])

    rate, loss, at = number("tokens_per_second", ",.0f"), line["loss"], line["failed_at_step"]
    return [
        line["arm"], f"{line['timed']}" + f" (round {line['round']})" * (line["round"] > 1),
        rate if line["steady"] or not rate else f"({rate})", number("x_fp32", ".2f"), number("x_tf32", ".2f"),
        number(line["arm"], "", PLAN), number("x_fp32_of_plan", ".2f"), number("x_tf32_of_plan", ".2f"),
        *(number(key, ".1f", line["step_ms"] or {}) for key in ("p50", "p5", "p95")), number("peak_memory_gb", ".2f"),
        number("joules_per_step", ".1f"), f"{loss[0]:.3f} to {loss[-1]:.3f}" if loss else "",
        line["status"] + (f" at step {at}" if at else "") + (f": {line['note']}" if line["note"] else ""),
    ]  # fmt: skip


def show(rows: list[Row]) -> None:
    """Print, in Markdown, for each device, torch and settings: the table, the check, and the kernels."""
    for spot in dict.fromkeys(map(place, rows)):
        print(f"\n{spot[0]}, torch {spot[1]}, settings {spot[2]}")
        here = [row for row in rows if place(row) == spot]
        tables: dict[str, list[Any]] = {"Throughput": [HEADING, *map(cells, compare(here))]}
        for row in here:
            if row["kind"] == "check":
                keys = ("stored", "multiplied", "matmul_error", "reason")
                tables["Check"] = [("arm", "stored", "multiplied", "error of a float32 matmul", "not applicable")]
                tables["Check"] += [(arm, *(got.get(key, "") for key in keys)) for arm, got in row["arms"].items()]
            elif row["kind"] == "profile" and row.get("kernels"):
                total, name = row["kernels_ms"], f"{row['arm']}: {row['kernels_ms']:.2f} ms of kernels a step"
                found = [(k["kernel"], f"{k['ms']:.2f}", f"{k['ms'] / total:.1%}", k["calls"]) for k in row["kernels"]]
                tables[name] = [("kernel", "ms a step", "share", "calls a step"), *found]
        for name, lines in tables.items():
            texts = [[str(cell).replace("|", "/") for cell in line] for line in lines]
            widths = [max(len(line[i]) for line in texts) for i in range(len(texts[0]))]
            texts.insert(1, ["-" * width for width in widths])
            print(f"\n{name}\n")
            for line in texts:
                print(f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |")
    print(f"\n{LEGEND}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/precision_gpu.json"), metavar="FILE")
    parser.add_argument("--resume-from", type=Path, metavar="FILE", help="take over what another file has")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print what a file has as Markdown, measure nothing")
    parser.add_argument("--budget-seconds", type=float, default=540, help="start nothing that is expected to end later")
    parser.add_argument("--arms", nargs="+", choices=list(load_study(STUDY).arms), metavar="ARM", help="only these")
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each arm, ten or more")
    parser.add_argument("--long-steps", type=int, default=300, help="timed steps of the core arms; 0: no such runs")
    parser.add_argument("--rounds", type=int, default=2, help="how often the core arms take --steps")
    parser.add_argument("--tiny", action="store_true", help="two layers and 12 steps, to try this without a GPU")
    parser.add_argument("--work", type=Path, default=Path("runs/precision_gpu"), metavar="DIR")
    words, flags = lift_settings(sys.argv[1:] if argv is None else argv)
    if "--tiny" in words:
        parser.set_defaults(steps=12, long_steps=24)
    args = parser.parse_args(words)

    if min(args.steps, args.long_steps or args.steps) < 10:
        parser.error("fewer than ten timed steps tell nothing")  # and the stopwatch would count untimed ones

    def read(file: Path) -> list[Row]:
        return json.loads(file.read_text())["rows"]

    if args.table:
        show(read(args.table))
        return 0
    known: dict[tuple[Any, ...], Row] = {}
    for file in filter(None, (args.resume_from, args.out if args.out.is_file() else None)):
        known |= {identity(row): row for row in read(file) if row["status"] in ENDED or identity(row) not in known}
    rows = list(known.values())
    left = measure(args, (TINY if args.tiny else {}) | flags, rows)
    show(rows)
    say(f"{left} jobs are left: the same call goes on" if left else "nothing is left to do")
    return 1 if any(row.get("problems") or row["status"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        job = json.loads(sys.argv[2])
        Path(job["answer"]).write_text(json.dumps({"where": where, "check": check}.get(job["kind"], train)(job)))
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what runs is then stopped, too
        sys.exit(main())
