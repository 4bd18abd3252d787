"""The arms of the study precision-lm on one GPU: speed, memory and first losses, compared with amp_bf16.

GPT-2 124M with 12 x 1,024 x 5 tokens per update, as in the study. Each arm is compiled and warmed up, and then takes
turns with amp_bf16, one update per turn, in alternating order. Ratios compare neighbouring turns. tests/test_cuda.py
checks that an arm multiplies in the formats of its regime.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from common import in_turn, ratios, show, spread

from gptlab.config import load_study
from gpu_stages.stage import Row, Stage, kernels_of, let_go, pick, run
from gpu_stages.trained import Trained, compile_many, seconds_of, settings_of

STUDY, REFERENCE = "precision-lm", "amp_bf16"
# Throughput relative to fp32_baseline that the study's plan expects, as rough values.
PLAN = {"amp_bf16": 2.0, "bf16_pure": 2.1, "fp16_naive": 2.0}
FIRST = ("amp_bf16", "bf16_master", "fp32_baseline", "fp32_tf32_matmul", "bf16_pure", "amp_fp16")
FIRST += ("fp8_tensorwise", "fp8_rowwise")
WARM, ROUNDS = 4, 5


class Arms:
    def __init__(self, stage: Stage) -> None:
        self.stage, self.device = stage, pick(stage)
        self.study = load_study(STUDY)
        self.reference: Trained | None = None
        compile_many()

    def make(self, arm: str) -> tuple[Trained, float]:
        recipe, settings = self.study.build(arm, seed=0), settings_of(self.stage)
        if recipe.compile.enabled is False:  # the arm compares eager execution
            settings["compile.enabled"] = False
        model = Trained(recipe.replace(settings), self.device, self.stage.work)
        return model, model.warm_up(WARM)

    def measure(self, arm: str) -> Row:
        if self.reference is None:
            self.reference, self.first = self.make(REFERENCE)
        cuda = self.device.type == "cuda"
        held = torch.cuda.memory_allocated() if cuda else 0
        model, first = (self.reference, self.first) if arm == REFERENCE else self.make(arm)
        sides = {arm: model, REFERENCE: self.reference}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        peak = 0.0
        for side in in_turn(list(sides), 2 if self.stage.tiny else ROUNDS):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            seconds[side].append(seconds_of(sides[side].update, self.device))
            if cuda and side == arm:
                peak = torch.cuda.max_memory_allocated() / 1e9 - (0 if arm == REFERENCE else held / 1e9)
        losses = model.losses_so_far()
        row: Row = {
            "turns_seconds": seconds,
            "tokens_per_second": spread([model.tokens / s for s in seconds[arm]]),
            "of_amp_bf16": ratios(seconds[REFERENCE], seconds[arm]),
            "peak_gb": peak or None,
            "planned_gb": model.planned() / 1e9,
            "first_update_seconds": first,
            "losses": losses,
            "finite": all(map(math.isfinite, losses)),
            "compiled": bool(model.recipe.compile.enabled),
        }
        fp32 = self.stage.rows.get("fp32_baseline", {}).get("of_amp_bf16")
        if fp32:
            row["x_fp32"] = row["of_amp_bf16"]["median"] / fp32["median"]
            row["plan"] = PLAN.get(arm)
        gb = f" {peak:.2f} GB," if peak else ""
        end = "the loss is not finite" if not row["finite"] else f"loss {losses[0]:.3f} to {losses[-1]:.3f}"
        says = f"{show(row['tokens_per_second'], ',.0f')} tokens/s, {show(row['of_amp_bf16'], '.3f')} of amp_bf16,"
        return row | {"says": f"{says}{gb} {end}, first update {first:.0f} s"}

    def kernels(self, arm: str) -> Row:
        """The kernels of an update."""
        model = self.reference if arm == REFERENCE and self.reference else self.make(arm)[0]
        row = kernels_of(model.update, self.device)
        told = ", ".join(f"{kind} {ms:.2f}" for kind, ms in row["by_class_ms"].items())
        return row | {"says": f"{row['ms']:.1f} ms of kernels an update: {told}"}


def main(stage: Stage) -> None:
    arms = Arms(stage)
    names = [*FIRST, *(arm for arm in arms.study.arms if arm not in FIRST)]
    assert set(names) == set(arms.study.arms)
    items: dict[str, Callable[[], Row]] = {arm: lambda arm=arm: arms.measure(arm) for arm in names}  # type: ignore[misc]
    items |= {f"kernels {arm}": lambda arm=arm: arms.kernels(arm) for arm in ("amp_bf16", "bf16_master")}  # type: ignore[misc]
    stage.all(items, expects=12.0, most=100.0)
    let_go()
    # arms that ran before the baseline get their ratio now
    fp32 = stage.rows["fp32_baseline"].get("of_amp_bf16")
    for arm in names:
        if fp32 and "of_amp_bf16" in stage.rows[arm]:
            stage.rows[arm]["x_fp32"] = stage.rows[arm]["of_amp_bf16"]["median"] / fp32["median"]
    stage.save()


if __name__ == "__main__":
    run(main)
