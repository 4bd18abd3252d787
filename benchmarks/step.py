"""One optimizer step of GPT-2 124M on a CPU: gptlab beside Hugging Face's GPT2LMHeadModel, eager and compiled.

A step is forward, loss, backward, clipping and AdamW on random tokens, batch 4 of 256, vocabulary 50304, no dropout,
SDPA attention on both sides, the same weights in number and shape. Each side steps as its user would: Hugging Face's
with the loss its `labels` give and torch.optim.AdamW as it comes, gptlab's with its own loss and `make_optimizer`.

Every variant lives in a process of its own, so that its peak memory is its own. The processes take turns, one step
at a time, while the others sleep; a pause between turns lets OpenMP's threads stop spinning. A round is one step of
each; every other round goes backwards. Peak memory (VmHWM) is given over the whole life of the process, which has the
imports and, where there is one, the compilation in it, and over the timed steps alone.

bf16 is measured where the processor multiplies it (avx512_bf16 or amx_bf16). Elsewhere PyTorch emulates it, many times
slower than float32, and the variant is left out unless --only names it.

    python benchmarks/step.py --rounds 10
    python benchmarks/step.py --rounds 3 --layers 2 --only hf_eager_fp32 gptlab_fp32
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from common import machine, ratios, say, show, spread, table, write_json

VARIANTS = ("hf_eager_fp32", "hf_compiled_fp32", "gptlab_fp32", "gptlab_compiled_fp32", "gptlab_bf16_compiled")
COMPARISONS = (  # of step times: above 1, the second is faster
    ("hf_compiled_fp32", "gptlab_fp32"),
    ("hf_compiled_fp32", "gptlab_compiled_fp32"),
    ("hf_eager_fp32", "gptlab_fp32"),
    ("hf_eager_fp32", "gptlab_bf16_compiled"),
    ("hf_eager_fp32", "hf_compiled_fp32"),
)


def peak_mb() -> float:
    """The most memory this process held since its start, or since `forget_peak`, in MB (1e6 bytes)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # proc(5): resets VmHWM to what is resident now


def make_step(variant: str, args: argparse.Namespace) -> Any:
    """A function that does one step of a variant and gives its mean loss."""
    import torch

    shape = {"n_layer": args.layers, "n_head": 12, "n_embd": 768}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50257, (args.batch, args.block + 1), generator=generator)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()  # (B, T) each

    if variant.startswith("hf"):
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=args.vocab,
            n_positions=args.block,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            attn_implementation="sdpa",
            bos_token_id=0,
            eos_token_id=0,
            **shape,
        )
        torch.manual_seed(0)
        hf = GPT2LMHeadModel(config).train()
        adamw = torch.optim.AdamW(hf.parameters(), lr=6e-4, weight_decay=0.1)
        call = torch.compile(hf) if "compiled" in variant else hf

        def hf_step() -> float:
            loss = call(input_ids=x, labels=x).loss  # labels are shifted inside
            loss.backward()
            torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            return loss.item()

        return hf_step

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

    def gptlab_step() -> float:
        with regime.context(device):
            loss = model(x, y) / y.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return gptlab_step


def worker(variant: str, args: argparse.Namespace, pipe: Connection) -> None:
    """Warm up, then step whenever the parent says so."""
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
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first round; the first one compiles")
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
        say(f"{before['cpu']} has no bf16 instructions: only {', '.join(before['instructions'])}")
    context = multiprocessing.get_context("spawn")
    workers = {}
    for variant in args.only:  # one after another: compiling and warming up are not to disturb each other
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
