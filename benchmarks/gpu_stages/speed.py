"""Training of GPT-2 124M: throughput, MFU, memory against the plan, kernels, and a comparison with two other loops.

The classic model is the recipe gpt2-124m-fineweb-edu (B = 64, T = 1,024), the modern model is
gpt2-124m-fineweb-edu-modern (B = 32). Both are compiled, in amp_bf16, with 524,288 tokens per update. The peers
are those of `gptlab bench step`: `nanogpt-loop`, and `hf`, which is GPT2LMHeadModel. Both are compiled too, with the
same autocast, fused AdamW and the same tokens. GPT2LMHeadModel keeps all logits in float32, so it starts with half the
micro-batch.

The sides take turns of one update each, in alternating order. A ratio compares neighbouring turns; above 1, gptlab is
faster. The peak memory of a side excludes the memory that the other side holds.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from common import in_turn, ratios, show, spread

from gptlab.bench.peers import Peer
from gptlab.config import load_recipe
from gpu_stages.stage import NotHere, Row, Stage, kernels_of, let_go, pick, run, status_of, synchronize
from gpu_stages.trained import Trained, compile_many, seconds_of, settings_of

CLASSIC, MODERN = "gpt2-124m-fineweb-edu", "gpt2-124m-fineweb-edu-modern"
ROUNDS = 5


def peer(name: str, of: Trained, micro: int) -> Peer:
    """A peer of `gptlab bench step` with the weights that our model began with."""
    if name == "hf" and importlib.util.find_spec("transformers") is None:
        raise NotHere("transformers is not installed")
    return Peer(name, of.recipe, of.task, of.regime, of.recipe.seed, of.device, micro)


# -- items ----------------------------------------------------------------------------------------------------------


class Speed:
    """The models of this stage, built when an item needs them."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.device = stage, pick(stage)
        self.models: dict[str, Trained] = {}
        compile_many()

    def trained(self, name: str) -> Trained:
        """A recipe's model, compiled and warmed up. Only one is kept, so that peak memory is that of one model."""
        if name not in self.models:
            self.models.clear()
            let_go()
            self.models[name] = model = Trained(
                load_recipe(name, settings_of(self.stage)), self.device, self.stage.work
            )
            self.first = model.warm_up(2)
        return self.models[name]

    def steps(self, name: str) -> Row:
        """Speed and memory of a model by itself."""
        cuda = self.device.type == "cuda"
        model = self.trained(name)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = [seconds_of(model.update, self.device) for _ in range(3 if self.stage.tiny else 8)]
        speed = spread([model.tokens / s for s in seconds])
        row: Row = {
            "recipe": name,
            "micro_batch": model.recipe.batch.micro_batch,
            "tokens_an_update": model.tokens,
            "block": model.recipe.model.block_size,
            "first_update_seconds": self.first,
            "seconds": seconds,
            "tokens_per_second": speed,
            "mfu": model.mfu(speed["median"]),
            "losses": model.losses_so_far(),
            "planned_gb": model.planned() / 1e9,
            "flops_per_token": model.model.flops_per_token(),
        }
        says = f"{show(speed, ',.0f')} tokens/s"
        if row["mfu"]:
            says += f", MFU {row['mfu']:.3f}"
        if cuda:
            row |= {
                "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
                "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
            }
            says += f", {row['peak_gb']:.2f} GB at the peak, {row['planned_gb']:.2f} planned"
        return row | {"says": says + f", first update {self.first:.0f} s"}

    def kernels(self, name: str) -> Row:
        """Kernel times of a micro-step, and of the end of an update (clipping and the optimizer)."""
        model = self.trained(name)
        batches = model.task.micro_batches(model.step, model.recipe.batch.micro_batch)
        batch = next(iter(batches))
        factor = torch.full((), 1 / model.tokens, device=self.device)
        model.micro_step(batch, factor)
        row: Row = {"micro_step": kernels_of(lambda: model.micro_step(batch, factor), self.device)}
        self.stage.note(f"{self.short(name)} kernels", **row)

        def end() -> None:
            from gptlab.training.step_buffer import clip_gradients

            clip_gradients(model.model, 1.0)
            model.optimizer.step()

        row["end_of_update"] = kernels_of(end, self.device)
        model.optimizer.zero_grad(set_to_none=True)
        told = ", ".join(f"{kind} {ms:.2f}" for kind, ms in row["micro_step"]["by_class_ms"].items())
        return row | {
            "says": f"{row['micro_step']['ms']:.1f} ms of kernels: {told}; {row['end_of_update']['ms']:.2f} "
            "ms at the end of an update"
        }

    def beside(self, name: str, recipe: str = CLASSIC) -> Row:
        """Compare another loop with ours, in turns."""
        ours = self.trained(recipe)
        assert isinstance(ours.recipe.batch.micro_batch, int)
        micro = ours.recipe.batch.micro_batch // (2 if name == "hf" else 1)
        held = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
        while True:
            try:
                other = peer(name, ours, micro)
                first = seconds_of(other.update, self.device)
                other.update()
                break
            except Exception as error:
                if status_of(error) != "out_of_memory" or micro == 1:
                    raise
                other, micro = None, micro // 2  # type: ignore[assignment]
                print(f"{name}: out of memory; trying micro-batch {micro}", flush=True)
            let_go()
        ours.update()
        sides: dict[str, Any] = {"gptlab": ours, name: other}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        peaks: dict[str, float] = {}
        for side in in_turn(list(sides), 2 if self.stage.tiny else ROUNDS):
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds[side].append(seconds_of(sides[side].update, self.device))
            if self.device.type == "cuda" and side == name:  # without the memory of our model
                peaks[side] = (torch.cuda.max_memory_allocated() - held) / 1e9
            self.stage.note(f"classic beside {name}", turns_seconds=seconds)
        gain = ratios(seconds[name], seconds["gptlab"])
        speed = {side: spread([ours.tokens / s for s in times]) for side, times in seconds.items()}
        return {
            "micro_batch": {"gptlab": ours.recipe.batch.micro_batch, name: micro},
            "first_update_seconds": first,
            "turns_seconds": seconds,
            "tokens_per_second": speed,
            "gptlab_is_faster_by": gain,
            "peak_gb": peaks,
            "loss": {"gptlab": float(ours.losses[-1]), name: float(other.losses[-1])},
            "says": f"gptlab / {name}: {show(gain, '.3f')}; {name} {show(speed[name], ',.0f')} tokens/s, micro-batch "
            f"{micro}, compiled in {first:.0f} s",
        }

    @staticmethod
    def short(name: str) -> str:
        return "classic" if name == CLASSIC else "modern"


def main(stage: Stage) -> None:
    speed = Speed(stage)
    synchronize(speed.device)
    # building the modern model drops the classic model; the last item builds the classic model again
    stage.all(
        {
            "classic": lambda: speed.steps(CLASSIC),
            "classic kernels": lambda: speed.kernels(CLASSIC),
            "classic beside nanogpt-loop": lambda: speed.beside("nanogpt-loop"),
            "modern": lambda: speed.steps(MODERN),
            "modern kernels": lambda: speed.kernels(MODERN),
            "classic beside hf": lambda: speed.beside("hf"),
        },
        expects=10.0,
        most=120.0,
    )


if __name__ == "__main__":
    run(main)
