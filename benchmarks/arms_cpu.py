"""CPU time of a training step of every arm of a study, relative to the baseline, on random tokens.

A step follows the arm's recipe: forward and backward passes of all micro-batches, clipping, the optimizer. The arms
take turns in one process with one thread, one step per turn, in alternating order. CPU seconds are measured, because
other processes affect them less than wall time. Arms that this machine cannot run are skipped.

Environment variables of PyTorch and oneDNN imitate an older processor, except for MKL's float32 products:

    python benchmarks/arms_cpu.py precision-lm-smoke --rounds 30
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/arms_cpu.py precision-cls-smoke
    ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 python benchmarks/arms_cpu.py precision-lm-smoke
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import in_turn, machine, ratios, say, show, spread, table, write_json

from gptlab.config import Recipe, load_study
from gptlab.errors import NotApplicable
from gptlab.model.encoder import build_encoder
from gptlab.model.gpt import build_model
from gptlab.optim.optimizers import make_optimizer
from gptlab.precision.regimes import apply_regime, enter_regime

CPU = torch.device("cpu")
LABELS = 64  # of a classifier, about as many as in the smoke recipe
WARM_UP = 3  # steps


def make_step(recipe: Recipe) -> Callable[[], None]:
    """A function that makes one step of a recipe. Raises NotApplicable if this machine does not support it."""
    regime = enter_regime(recipe.precision, CPU)
    vocab_size = recipe.model.vocab_size or {"byte": 256}.get(recipe.data.tokenizer, 512)
    config = recipe.model.model_copy(update={"vocab_size": vocab_size})
    n, T = recipe.sequences_per_step, recipe.model.block_size
    B = n if recipe.batch.micro_batch == "auto" else recipe.batch.micro_batch
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (B, T), generator=generator)
    batch: tuple[Any, ...] = tokens, tokens.roll(-1, 1), None
    model: Any
    if recipe.task == "classify":
        model = build_encoder(config, LABELS, on_meta=lambda m: apply_regime(m, regime))
        batch = tokens, torch.full((B,), T), (torch.rand(B, LABELS, generator=generator) < 0.1).float()
    else:
        model = build_model(config, on_meta=lambda m: apply_regime(m, regime))
    optimizer = make_optimizer(model, recipe.optim)

    def step() -> None:
        for _ in range(-(-n // B)):
            with regime.context(CPU):
                loss = model(*batch, torch.tensor(1 / (n * T))).train
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    study, steps = load_study(args.study), {}
    for arm in study.arms:
        try:
            steps[arm] = make_step(study.build(arm, 0))
        except NotApplicable as error:
            say(f"{arm}: {error}")
    seconds: dict[str, list[float]] = {arm: [] for arm in steps}
    for turn, arm in enumerate(in_turn(list(steps), WARM_UP + args.rounds)):
        began = time.process_time()
        steps[arm]()
        if turn >= WARM_UP * len(steps):
            seconds[arm].append(time.process_time() - began)
    relative = {arm: ratios(times, seconds[study.baseline]) for arm, times in seconds.items()}
    table(
        [("arm", "ms a step", f"relative to {study.baseline}")]
        + [(arm, show(spread([1e3 * s for s in seconds[arm]]), ".1f"), show(relative[arm], ".2f")) for arm in steps]
    )
    limits = {key: os.environ.get(key) for key in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")}
    facts = {"machine": machine(), "torch": torch.__version__, "limits": limits}
    write_json(args.json, facts | {"seconds": seconds, "relative": relative})


if __name__ == "__main__":
    main()
