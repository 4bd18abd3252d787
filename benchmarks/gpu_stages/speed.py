"""Training of GPT-2 124M: throughput, MFU, memory against the plan, kernels, and a comparison with two other loops.

The classic model is the recipe gpt2-124m-fineweb-edu (B = 64, T = 1,024), the modern model is
gpt2-124m-fineweb-edu-modern (B = 32). Both are compiled, in amp_bf16, with 524,288 tokens per update. `plain` is a
plain loop in the style of nanoGPT, `hugging face` is GPT2LMHeadModel. Both are compiled too, with the same autocast,
fused AdamW and the same tokens. GPT2LMHeadModel keeps all logits in float32, so it starts with half the micro-batch.

The sides take turns of one update each, in alternating order. A ratio compares neighbouring turns; above 1, gptlab is
faster. The peak memory of a side excludes the memory that the other side holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from common import hf_gpt2, in_turn, ratios, show, spread
from torch import Tensor

from gptlab.config import load_recipe
from gpu_stages.stage import NotHere, Row, Stage, kernels_of, let_go, pick, run, status_of, synchronize
from gpu_stages.trained import Trained, compile_many, seconds_of, settings_of

CLASSIC, MODERN = "gpt2-124m-fineweb-edu", "gpt2-124m-fineweb-edu-modern"
ROUNDS = 5


# -- the plain loop, without gptlab ---------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        B, T, C = x.shape
        parts = self.qkv(self.norm_1(x)).split(C, dim=-1)
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in parts)  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class Plain(nn.Module):
    """A straightforward GPT-2: the logits of all tokens at once, and F.cross_entropy over them."""

    def __init__(self, layers: int, heads: int, width: int, block: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(block, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # (B, T) each
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        logits = self.head(self.norm(h))  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


class Peer:
    """Another model with torch's AdamW in a short loop.

    Args:
        model: the model to train.
        loss: function of inputs and targets, (B, T) each.
        of: our model; it provides the device, the regime and the tokens.
        micro: sequences in a micro-batch.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], of: Trained, micro: int) -> None:
        self.model, self.loss, self.of, self.micro = model, loss, of, micro
        groups = [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=of.device.type == "cuda")
        self.step, self.losses = 0, [0.0]
        if of.recipe.compile.enabled:
            self.loss = torch.compile(loss, dynamic=False)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y, *_ in self.of.task.micro_batches(self.step, self.micro):
            yield x.contiguous(), y.contiguous()

    def update(self) -> None:
        count = -(-self.of.recipe.sequences_per_step // self.micro)
        total = torch.zeros((), device=self.of.device)
        for x, y in self.batches():
            with self.of.regime.context(self.of.device):
                loss = self.loss(x, y) / count
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.append(total)  # type: ignore[arg-type]


def plain(of: Trained, micro: int) -> Peer:
    m = of.recipe.model
    with of.device:
        model = Plain(m.n_layer, m.n_head, m.n_embd, m.block_size, m.vocab_size)
    return Peer(model, model, of, micro)


def hugging_face(of: Trained, micro: int) -> Peer:
    m = of.recipe.model
    shape = {"n_layer": m.n_layer, "n_head": m.n_head, "n_embd": m.n_embd, "n_positions": m.block_size}
    try:
        with of.device:
            model = hf_gpt2(**shape, vocab_size=m.vocab_size)
    except ImportError as error:
        raise NotHere(f"transformers: {error}") from None

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return model(input_ids=x, labels=x).loss  # the model shifts the labels, so each sequence has one target less

    return Peer(model, loss, of, micro)


PEERS = {"plain": plain, "hugging face": hugging_face}


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
        micro = ours.recipe.batch.micro_batch // (2 if name == "hugging face" else 1)
        held = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
        while True:
            try:
                peer = PEERS[name](ours, micro)
                first = seconds_of(peer.update, self.device)
                peer.update()
                break
            except Exception as error:
                if status_of(error) != "out_of_memory" or micro == 1:
                    raise
                peer, micro = None, micro // 2  # type: ignore[assignment]
                print(f"{name}: out of memory; trying micro-batch {micro}", flush=True)
            let_go()
        ours.update()
        sides: dict[str, Any] = {"gptlab": ours, name: peer}
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
            "loss": {"gptlab": float(ours.losses[-1]), name: float(peer.losses[-1])},
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
            "classic beside plain": lambda: speed.beside("plain"),
            "modern": lambda: speed.steps(MODERN),
            "modern kernels": lambda: speed.kernels(MODERN),
            "classic beside hugging face": lambda: speed.beside("hugging face"),
        },
        expects=10.0,
        most=120.0,
    )


if __name__ == "__main__":
    run(main)
