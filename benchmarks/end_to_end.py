"""`gptlab train shakespeare-char-cpu` against a plain eager PyTorch loop: whole processes, from start to end.

gptlab's process imports, trains, evaluates, writes checkpoints, and draws its plots and its card. The peer
(`plain_loop.py`, in the style of nanoGPT) imports, trains and evaluates the same model equally often on the same number
of tokens; it writes nothing, or with --peer-saves its best model, as nanoGPT does. The two take turns in alternating
order. Measured are wall seconds, and user and system seconds of the process and its children.

At the end, `gptlab eval` scores the last run on the whole validation split.

    python benchmarks/end_to_end.py --text shakespeare.txt --pairs 3
    python benchmarks/end_to_end.py --data data/shakespeare-char --steps 100

--data is a dataset in nanoGPT's format (`gptlab prepare shakespeare --tokenizer char --format nanogpt`). --text makes
such a dataset, in --data or a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, ratios, say, show, spread, table, write_json

from gptlab.config import load_recipe

HERE = Path(__file__).parent
GPTLAB = [sys.executable, "-m", "gptlab"]


def timed(command: list[str], log: Path) -> dict[str, float]:
    """Wall seconds and CPU seconds (user and system) of a process. Its output goes to `log`."""
    with open(log, "w") as file:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text(encoding='utf-8')[-2000:]}")
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="dataset in nanoGPT's format")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text of a new dataset")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000, help="training steps (default: 2000, as in the recipe)")
    parser.add_argument("--gelu", choices=["tanh", "erf"], help="GELU of both models (default: the recipe's)")
    parser.add_argument("--peer-saves", action="store_true", help="the peer saves its best model, as nanoGPT does")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.data is None and args.text is None:
        parser.error("give --data DIR, or --text FILE to make a dataset")

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = args.data or work / "data"
        if args.text:
            prepare = ["prepare", "shakespeare", "--from", str(args.text), "--tokenizer", "char", "--format", "nanogpt"]
            subprocess.run([*GPTLAB, *prepare, "--out", str(data)], check=True, stdout=sys.stderr)
        vocab_size = json.loads((data / "manifest.json").read_text(encoding="utf-8"))["tokenizer"]["vocab_size"]
        overrides = {"model.mlp": {"tanh": "gelu", "erf": "gelu_erf"}[args.gelu]} if args.gelu else {}
        mlp = load_recipe("shakespeare-char-cpu", overrides).model.mlp
        gelu = {"gelu": "tanh", "gelu_erf": "erf"}[mlp]

        before = machine()
        seconds: dict[str, list[dict[str, float]]] = {"gptlab": [], "plain": []}
        for pair in range(args.pairs):
            run = work / f"run{pair}"
            commands = {
                "gptlab": [
                    *GPTLAB,
                    "train",
                    "shakespeare-char-cpu",
                    "--out",
                    str(run),
                    "--data.path",
                    str(data),
                    "--train.max-steps",
                    str(args.steps),
                    "--model.mlp",
                    mlp,
                    "--seed",
                    str(1337 + pair),
                ],
                "plain": [
                    sys.executable,
                    str(HERE / "plain_loop.py"),
                    "--data",
                    str(data),
                    "--vocab-size",
                    str(vocab_size),
                    "--steps",
                    str(args.steps),
                    "--gelu",
                    gelu,
                    "--seed",
                    str(1337 + pair),
                    "--json",
                    str(work / f"plain{pair}.json"),
                    *(["--save", str(work / "ckpt.pt")] if args.peer_saves else []),
                ],
            }
            for name in sorted(commands, reverse=pair % 2 == 1):
                seconds[name].append(timed(commands[name], work / f"{name}.log"))
                say(f"pair {pair + 1}/{args.pairs} {name}: {seconds[name][-1]['wall']:.2f} s")

        scores_file = work / "scores.json"
        subprocess.run(
            [*GPTLAB, "eval", str(run), "--data.path", str(data), "--out", str(scores_file)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        scores = json.loads(scores_file.read_text(encoding="utf-8"))
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        plain = json.loads((work / f"plain{pair}.json").read_text(encoding="utf-8"))

    columns = {
        name: {kind: [one[kind] for one in measured] for kind in ("wall", "cpu")} for name, measured in seconds.items()
    }
    compared = {kind: ratios(columns["gptlab"][kind], columns["plain"][kind]) for kind in ("wall", "cpu")}
    step_ms = {"gptlab": result["time_per_iter_ms"], "plain": plain["step_ms"]}
    val_loss = {"gptlab": result["final_val_loss"], "plain": plain["evaluations"][-1]["val"]}
    write_json(
        args.json,
        {
            "machine": before,
            "steps": args.steps,
            "gelu": gelu,
            "pairs": args.pairs,
            "seconds": columns,
            "gptlab / plain": compared,
            "step_ms of the last pair": step_ms,
            "sampled val_loss of the last pair": val_loss,
            "gptlab eval": scores,
        },
    )
    table(
        [
            (f"{args.steps} steps, {gelu} GELU", "wall s", "CPU s", "ms a step", "val loss (sampled)"),
            *(
                (
                    name,
                    show(spread(columns[name]["wall"]), ".2f"),
                    show(spread(columns[name]["cpu"]), ".2f"),
                    f"{step_ms[name]:.2f}",
                    f"{val_loss[name]:.4f}",
                )
                for name in columns
            ),
            (
                "gptlab / plain",
                show(compared["wall"]),
                show(compared["cpu"]),
                f"{step_ms['gptlab'] / step_ms['plain']:.3f}",
                "",
            ),
        ]
    )
    print(f"val_loss on the whole validation split: {scores['val_loss']:.4f} ({scores['tokens']:,} tokens)")


if __name__ == "__main__":
    main()
