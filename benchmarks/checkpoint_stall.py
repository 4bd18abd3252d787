"""How long saving a checkpoint delays training, compared with a plain copy of the same tensors.

A medium-sized model trains. Between two steps, either its weights and moments are copied (`clone`), or
`Checkpoints.save` is called; both in turns, and after the previous checkpoint has been written. Training continues
while the checkpoint is written in the background; these steps are compared with steps without a write. A save waits
until the previous checkpoint is on the disk, so the write time is the minimum time between two saves. Before each copy
and each save, freed memory is returned to the system, so that neither reuses pages that the other has touched.

    python benchmarks/checkpoint_stall.py --rounds 5
    python benchmarks/checkpoint_stall.py --layers 12 --width 768 --vocab 50304     # GPT-2 124M: 1.5 GB
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import tempfile
import time
from pathlib import Path

import torch
from common import machine, ratios, say, show, spread, table, write_json

from gptlab.config import Model, Optim
from gptlab.model.gpt import build_model
from gptlab.optim.optimizers import make_optimizer
from gptlab.rundir import RunDir
from gptlab.training.checkpoint import Checkpoints
from gptlab.training.tensors import optimizer_tensors


def give_memory_back() -> None:
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--quiet-steps", type=int, default=4, help="steps per round without a write in the background")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where checkpoints go (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()

    before = machine()
    shape = Model(
        n_layer=args.layers, n_head=args.width // 64, n_embd=args.width, block_size=args.block, vocab_size=args.vocab
    )
    model = build_model(shape)
    optimizer = make_optimizer(model, Optim())
    tokens = torch.randint(args.vocab, (args.batch, args.block + 1))

    def step() -> float:
        began = time.perf_counter()
        (model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    for _ in range(3):
        step()
    tensors = [*model.state_dict().values(), *optimizer_tensors(model, optimizer).values()]
    megabytes = sum(t.numel() * t.element_size() for t in tensors) / 1e6
    names = ("copy", "save", "write", "step", "step_while_writing")
    seconds: dict[str, list[float]] = {name: [] for name in names}

    def measure_copy() -> None:
        give_memory_back()
        began = time.perf_counter()
        copies = [t.detach().clone() for t in tensors]
        seconds["copy"].append(time.perf_counter() - began)
        del copies

    def measure_save(checkpoints: Checkpoints, number: int) -> None:
        give_memory_back()
        began = time.perf_counter()
        checkpoints.save(model, optimizer, {"step": number})
        saved = time.perf_counter()
        seconds["save"].append(saved - began)
        writer = checkpoints.writer
        assert writer is not None
        while writer.is_alive():
            taken = step()
            if writer.is_alive():  # the write lasted during the whole step
                seconds["step_while_writing"].append(taken)
        checkpoints.wait()

    def measure_write(checkpoints: Checkpoints, number: int) -> None:
        """The write time without training at the same time."""
        checkpoints.save(model, optimizer, {"step": number})
        began = time.perf_counter()
        checkpoints.wait()
        seconds["write"].append(time.perf_counter() - began)

    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        checkpoints = Checkpoints(RunDir(folder), keep_last=1, keep_best=False)
        for round in range(args.rounds):
            seconds["step"] += [step() for _ in range(args.quiet_steps)]
            turns = [measure_copy, lambda n=2 * round: measure_save(checkpoints, n)]
            for turn in turns if round % 2 == 0 else reversed(turns):
                turn()
            measure_write(checkpoints, 2 * round + 1)
            say(f"round {round + 1}/{args.rounds}: copy {seconds['copy'][-1]:.4f} s, save {seconds['save'][-1]:.4f} s")

    ratio = ratios(seconds["save"], seconds["copy"])
    beside = seconds["step_while_writing"]
    slowed = spread(beside)["median"] / spread(seconds["step"])["median"] if beside else None
    write_json(
        args.json,
        {
            "machine": before,
            "threads": torch.get_num_threads(),
            "megabytes": megabytes,
            "seconds": seconds,
            "save / copy": ratio,
            "step while writing / step": slowed,
        },
    )
    milli = {name: [1000 * s for s in taken] for name, taken in seconds.items()}
    table(
        [
            (f"{megabytes:.0f} MB", "ms"),
            ("copy of the tensors", show(spread(milli["copy"]), ".1f")),
            ("stall: Checkpoints.save", show(spread(milli["save"]), ".1f")),
            ("save / copy", show(ratio)),
            ("writing, in the background", show(spread(milli["write"]), ".0f")),
            ("step", show(spread(milli["step"]), ".1f")),
            ("step while writing", show(spread(milli["step_while_writing"]), ".1f") if beside else "none fitted in"),
        ]
    )


if __name__ == "__main__":
    main()
