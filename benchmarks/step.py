"""One optimizer step of GPT-2 124M on a CPU: gptlab against Hugging Face's GPT2LMHeadModel, eager and compiled.

A step is forward, loss, backward, clipping and AdamW on random tokens: 4 sequences of 256 tokens, vocabulary 50304, no
dropout, SDPA attention, weights of the same shapes on both sides. Each side is used in its usual way: Hugging Face's
model with the loss from `labels` and the default torch.optim.AdamW, gptlab with its own loss and `make_optimizer`.

Every variant has its own process, so that its peak memory can be measured. The processes take turns, one step at a
time, while the others sleep; a pause between turns lets OpenMP's threads stop spinning. A round is one step of each
variant, in alternating order. Peak memory (VmHWM) is given for the whole process, including imports and compilation,
and for the timed steps alone.

bf16 is measured if the processor has bf16 instructions (avx512_bf16 or amx_bf16). PyTorch otherwise emulates bf16, many
times slower than float32, and the variant is skipped unless --only names it.

    python benchmarks/step.py --rounds 10
    python benchmarks/step.py --rounds 3 --layers 2 --only hf_eager_fp32 gptlab_fp32
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import hf_gpt2, machine, ratios, say, show, spread, table, write_json

if TYPE_CHECKING:
    import torch

VARIANTS = ("hf_eager_fp32", "hf_compiled_fp32", "gptlab_fp32", "gptlab_compiled_fp32", "gptlab_bf16_compiled")
COMPARISONS = (  # ratios of step times; above 1, the second variant is faster
    ("hf_compiled_fp32", "gptlab_fp32"),
    ("hf_compiled_fp32", "gptlab_compiled_fp32"),
    ("hf_eager_fp32", "gptlab_fp32"),
    ("hf_eager_fp32", "gptlab_bf16_compiled"),
    ("hf_eager_fp32", "hf_compiled_fp32"),
)


def peak_mb() -> float:
    """Peak memory of this process since its start or since `forget_peak`, in MB (1e6 bytes)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM to the current memory, see proc(5)


def make_step(variant: str, args: argparse.Namespace) -> Any:
    """A function that makes one step of a variant and returns the mean loss."""
    import torch

    def step_of(model: Any, optimizer: torch.optim.Optimizer, loss_of: Callable[[], torch.Tensor]) -> Any:
        def step() -> float:
            loss = loss_of()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step

    shape = {"n_layer": args.layers, "n_head": 12, "n_embd": 768}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50257, (args.batch, args.block + 1), generator=generator)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()  # (B, T) each

    if variant.startswith("hf"):
        torch.manual_seed(0)
        hf = hf_gpt2(n_positions=args.block, vocab_size=args.vocab, **shape)
        adamw = torch.optim.AdamW(hf.parameters(), lr=6e-4, weight_decay=0.1)
        call = torch.compile(hf) if "compiled" in variant else hf
        return step_of(hf, adamw, lambda: call(input_ids=x, labels=x).loss)  # the model shifts the labels

    from gptlab.config import Model, Optim, Precision
    from gptlab.model.gpt import build_model
    from gptlab.optim.optimizers import make_optimizer
    from gptlab.precision.regimes import enter_regime

    device = torch.device("cpu")
    regime = enter_regime(Precision(regime="amp_bf16" if "bf16" in variant else "fp32"), device)
    model = build_model(Model(block_size=args.block, vocab_size=args.vocab, **shape), device, regime.weights)
    optimizer = make_optimizer(model, Optim())
    if "compiled" in variant:
        model.compile(dynamic=False)

    def loss_of() -> torch.Tensor:
        with regime.context(device):
            return model(x, y) / y.numel()

    return step_of(model, optimizer, loss_of)


def worker(variant: str, args: argparse.Namespace, pipe: Connection) -> None:
    """Warm up, then make a step for each message from the parent process."""
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    step = make_step(variant, args)
    began = time.perf_counter()
    first = step()
    warm_up = time.perf_counter() - began
    for _ in range(args.warmup - 1):
        step()
    before = peak_mb()
    forget_peak()
    pipe.send(
        {
            "first_loss": first,
            "first_step_seconds": warm_up,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
    )
    while pipe.recv() == "go":
        began = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - began)
    steps = peak_mb()
    pipe.send({"peak_mb": max(before, steps), "peak_mb_of_steps": steps})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first round; the first step compiles")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--block", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--pause", type=float, default=0.1, metavar="S", help="seconds between two turns")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()

    before = machine()
    multiplies_bf16 = any("bf16" in name for name in before["instructions"])
    if args.only is None:
        args.only = [variant for variant in VARIANTS if multiplies_bf16 or "bf16" not in variant]
    if not multiplies_bf16:
        say(f"{before['cpu']} has no bf16 instructions, only {', '.join(before['instructions'])}")
    context = multiprocessing.get_context("spawn")
    workers = {}
    for variant in args.only:  # one after the other, so that compiling and warming up do not disturb each other
        pipe, theirs = context.Pipe()
        process = context.Process(target=worker, args=(variant, args, theirs), daemon=True)
        process.start()
        theirs.close()
        facts = pipe.recv()
        say(f"{variant}: first step {facts['first_step_seconds']:.1f} s, loss {facts['first_loss']:.4f}")
        workers[variant] = (process, pipe, facts)

    seconds: dict[str, list[float]] = {variant: [] for variant in workers}
    for round in range(args.rounds):
        for variant in sorted(workers, key=args.only.index, reverse=round % 2 == 1):
            time.sleep(args.pause)
            pipe = workers[variant][1]
            pipe.send("go")
            seconds[variant].append(pipe.recv())
        say(f"round {round + 1}/{args.rounds}: " + "  ".join(f"{v} {s[-1]:.3f}" for v, s in seconds.items()))

    memory = {}
    for variant, (process, pipe, _) in workers.items():
        pipe.send("stop")
        memory[variant] = pipe.recv()
        process.join()

    compared = {f"{a} / {b}": ratios(seconds[a], seconds[b]) for a, b in COMPARISONS if a in seconds and b in seconds}
    write_json(
        args.json,
        {
            "machine": before,
            "shape": {key: getattr(args, key) for key in ("layers", "block", "batch", "vocab")},
            "seconds": seconds,
            "ratios": compared,
            "memory": memory,
            "facts": {variant: facts for variant, (_, _, facts) in workers.items()},
        },
    )
    table(
        [
            ("variant", "ms a step", "first step s", "peak MB", "peak MB of steps"),
            *(
                (
                    variant,
                    show(spread([1000 * s for s in seconds[variant]]), ".0f"),
                    f"{workers[variant][2]['first_step_seconds']:.1f}",
                    f"{memory[variant]['peak_mb']:.0f}",
                    f"{memory[variant]['peak_mb_of_steps']:.0f}",
                )
                for variant in workers
            ),
        ]
    )
    print()
    table([("ratio of times", "median (min .. max)"), *((name, show(ratio)) for name, ratio in compared.items())])


if __name__ == "__main__":
    main()
