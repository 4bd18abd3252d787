"""What each change of a step is worth: on against off in one run, in the order of the largest expected gain.

GPT-2 124M with two of its twelve layers, which compiles in seconds: recipe gpt2-124m-fineweb-edu, 64 x 1,024 tokens a
micro-batch, four micro-batches an update. The difference of two sides is that of two layers, or that of the head, which
two and twelve layers share. From the second item on, both sides are in bf16_master. The last item has all twelve
layers, with and without what is ours.

The sides take turns of one update each, in alternating order. A ratio compares neighbouring turns; above 1, on is
faster. The losses of the first update must agree. On a CPU the kernel runs in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator

import torch
from common import in_turn, ratios, show, spread

from gptlab.config import load_recipe
from gptlab.model import loss
from gptlab.precision.regimes import make_regime
from gptlab.training.attention import attention_seconds
from gpu_stages.stage import NotHere, Row, Stage, let_go, milliseconds, pick, rate, run
from gpu_stages.trained import Trained, compile_many, seconds_of, settings_of

RECIPE = "gpt2-124m-fineweb-edu"
TWO_LAYERS = {"model.n_layer": 2, "batch.tokens_per_step": 4 * 65536, "precision.regime": "bf16_master"}
ONE_SEQUENCE = {"batch.micro_batch": 1, "batch.tokens_per_step": 64}  # for the interpreter
# name -> settings of the side that is off, of the side that is on
CHANGES: dict[str, tuple[Row, Row]] = {
    "bf16_master": ({"precision.regime": "amp_bf16"}, {}),
    "no biases": ({}, {"model.bias": False}),
    "max-autotune": ({}, {"compile.mode": "max-autotune"}),
    "attention": ({"train.attention": "flash"}, {"train.attention": "cudnn"}),
}
AGREE = 0.02  # nats: largest difference of the losses of two sides that compute the same
WARM, ROUNDS = 3, 8


class Side:
    """A model in training, with what is switched for it alone."""

    def __init__(
        self,
        parts: Parts,
        settings: Row,
        kernel: bool | None = None,
        mixed: bool | None = None,
        ahead: bool | None = None,
    ) -> None:
        self.parts, self.mixed = parts, mixed
        self.kernel = parts.device.type == "cuda" if kernel is None else kernel  # the interpreter is slow
        recipe = load_recipe(RECIPE, TWO_LAYERS | settings_of(parts.stage) | settings)
        self.trained = Trained(recipe, parts.device, parts.stage.work, ahead)
        self.first = seconds_of(self.update, parts.device)
        for _ in range(0 if parts.stage.tiny else WARM - 1):
            self.update()

    def update(self) -> None:
        with switched(self.parts.kernel_on(self.kernel), self.mixed):
            self.trained.update()


@contextlib.contextmanager
def switched(devices: tuple[str, ...], mixed: bool | None) -> Iterator[None]:
    """The devices where the head has its kernel; whether Inductor sums two ways in one pass. It matters in compilation,
    and without it in every step."""
    import torch._inductor.config as inductor

    before, loss.KERNEL_DEVICES = loss.KERNEL_DEVICES, devices
    changes = {} if mixed is None else {"triton.mix_order_reduction": mixed}
    try:
        with inductor.patch(changes):
            yield
    finally:
        loss.KERNEL_DEVICES = before


class Parts:
    def __init__(self, stage: Stage) -> None:
        self.stage, self.device = stage, pick(stage)
        if self.device.type == "cpu":
            os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
        compile_many()

    def kernel_on(self, on: bool) -> tuple[str, ...]:
        if on and importlib.util.find_spec("triton") is None:
            return ()
        return (self.device.type,) if on else ()

    def needs_triton(self) -> None:
        if importlib.util.find_spec("triton") is None:
            raise NotHere("Triton is not installed")

    def beside(self, name: str, make_off: Callable[[], Side], make_on: Callable[[], Side], same: bool = True) -> Row:
        """Two sides in turns."""
        cuda, sides, peaks = self.device.type == "cuda", {}, {}
        for which, make in (("off", make_off), ("on", make_on)):
            held = torch.cuda.memory_allocated() if cuda else 0
            sides[which] = make()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                sides[which].update()
                peaks[which] = (torch.cuda.max_memory_allocated() - held) / 1e9
        seconds: dict[str, list[float]] = {which: [] for which in sides}
        for which in in_turn(list(sides), 2 if self.stage.tiny else ROUNDS):
            seconds[which].append(seconds_of(sides[which].update, self.device))
            self.stage.note(name, turns_seconds=seconds)
        of = sides["on"].trained
        assert isinstance(of.recipe.batch.micro_batch, int)
        micro_batches = of.tokens / (of.recipe.batch.micro_batch * of.recipe.model.block_size)
        gain = ratios(seconds["off"], seconds["on"])
        saved = spread(
            [1e3 * (off - on) / micro_batches for off, on in zip(seconds["off"], seconds["on"], strict=True)]
        )
        losses = {which: side.trained.losses_so_far()[0] for which, side in sides.items()}
        if same and abs(losses["on"] - losses["off"]) > AGREE:
            raise RuntimeError(f"{name}: the losses of the first update differ: {losses}")
        first = {which: side.first for which, side in sides.items()}
        says = f"{show(gain)} times as fast, {show(saved, '.2f')} ms less a micro-batch"
        says += f", {peaks['on']:.1f} instead of {peaks['off']:.1f} GB" if cuda else ""
        return {
            "turns_seconds": seconds,
            "tokens_per_second": {which: spread([of.tokens / s for s in times]) for which, times in seconds.items()},
            "on_is_faster_by": gain,
            "milliseconds_less_a_micro_batch": saved,
            "first_update_seconds": first,
            "peak_gb": peaks,
            "first_losses": losses,
            "says": f"{says}, first update {first['on']:.0f} s instead of {first['off']:.0f} s",
        }

    def change(self, name: str) -> Row:
        off, on = CHANGES[name]
        if "train.attention" in on and self.device.type != "cuda":
            raise NotHere("cuDNN and flash attention are kernels of GPUs")
        return self.beside(name, lambda: Side(self, off), lambda: Side(self, on), same=name != "no biases")

    def head(self) -> Row:
        self.needs_triton()
        few = ONE_SEQUENCE if self.stage.tiny else {}
        name = "head kernel"
        return self.beside(name, lambda: Side(self, few, kernel=False), lambda: Side(self, few, kernel=True))

    def norms(self) -> Row:
        """LayerNorm's backward: the gradients of its input and of its weight in one kernel, or in two."""
        name = "norm backward in one kernel"
        return self.beside(name, lambda: Side(self, {}, mixed=False), lambda: Side(self, {}, mixed=True))

    def head_alone(self) -> Row:
        """The head's matmuls and loss, forward and backward, and the kernel by itself. No compiler."""
        self.needs_triton()
        N, C, V = (16, 32, 500) if self.stage.tiny else (65536, 768, 50304)
        x = torch.randn(N, C, dtype=torch.bfloat16, device=self.device, requires_grad=True)
        weight = (0.02 * torch.randn(V, C, device=self.device)).requires_grad_()
        targets = torch.randint(V, (N,), device=self.device)
        factor = torch.full((), 1 / N, device=self.device)
        row: Row = {"tokens": N}
        for which, on in (("off", False), ("on", True)):

            def both(on: bool = on) -> None:
                with switched(self.kernel_on(on), None):
                    train = loss.linear_cross_entropy(x, weight, targets, factor).train
                torch.autograd.grad(train, (x, weight))

            let_go()
            row[f"{which}_ms"] = spread(milliseconds(both, self.device, runs=2 if self.stage.tiny else 10, warmup=2))
            if self.device.type == "cuda":
                row[f"{which}_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        let_go()
        logits = torch.randn(N, V, dtype=torch.bfloat16, device=self.device)
        moved = 2 * logits.nbytes  # read once and written once
        for what, action in (
            ("kernel", lambda: loss.cross_entropy_(logits, targets, factor, True)),
            ("pass", lambda: logits.mul_(1.0)),
        ):
            times = milliseconds(action, self.device, runs=2 if self.stage.tiny else 10)
            row[f"{what}_ms"], row[f"{what}_tb_per_second"] = spread(times), rate(times, moved)
        return row | {
            "says": f"{show(row['on_ms'], '.1f')} ms with the kernel, {show(row['off_ms'], '.1f')} ms without; the "
            f"kernel alone {show(row['kernel_tb_per_second'], '.2f')} TB/s, a pass over the logits in place "
            f"{show(row['pass_tb_per_second'], '.2f')} TB/s"
        }

    def batches_ahead(self) -> Row:
        """A thread makes the batches of the next micro-batches, pinned, against making each when it is needed."""
        return self.beside("batches ahead", lambda: Side(self, {}, ahead=False), lambda: Side(self, {}, ahead=True))

    def kernels_of_attention(self) -> Row:
        """What train.attention = fastest measures."""
        recipe = load_recipe(RECIPE, settings_of(self.stage) | {"precision.regime": "bf16_master"})
        found = attention_seconds(recipe, make_regime(recipe.precision, self.device), self.device)
        told = ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in found.items())
        return {"seconds": found, "says": f"a layer's attention, forward and backward: {told or 'neither runs'}"}

    def whole(self) -> Row:
        """All twelve layers: amp_bf16 and PyTorch's operations on the logits against bf16_master and the kernel."""
        self.needs_triton()
        size = ONE_SEQUENCE if self.stage.tiny else {"model.n_layer": 12}
        return self.beside(
            "twelve layers",
            lambda: Side(self, {**size, "precision.regime": "amp_bf16"}, kernel=False),
            lambda: Side(self, size, kernel=True),
        )


def main(stage: Stage) -> None:
    parts = Parts(stage)
    items: dict[str, Callable[[], Row]] = {
        "bf16_master": lambda: parts.change("bf16_master"),
        "head kernel": parts.head,
        "head alone": parts.head_alone,
        "norm backward in one kernel": parts.norms,
        "no biases": lambda: parts.change("no biases"),
        "attention kernels": parts.kernels_of_attention,
        "attention": lambda: parts.change("attention"),
        "twelve layers": parts.whole,
        "batches ahead": parts.batches_ahead,
        "max-autotune": lambda: parts.change("max-autotune"),
    }
    stage.all(items, expects=15.0, most=150.0)


if __name__ == "__main__":
    run(main)
