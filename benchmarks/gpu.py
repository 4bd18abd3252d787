"""All GPU measurements in ten minutes: stages in order of importance, and one JSON file with the results.

    facts        device and versions, the attention kernels that PyTorch chooses, rates of matrix products and copies
    data         a dataset for the following stages: the source of Python's standard library in GPT-2's tokens
    correctness  the tests marked `cuda`
    speed        GPT-2 124M, classic and modern: tokens per second, MFU, memory, kernels; comparison with two loops
    parts        what each change of a step is worth, on against off: bf16_master, the head's kernel, attention, ...
    precision    the arms of the study precision-lm: speed, memory and loss relative to amp_bf16
    optimizers   the overhead of every optimizer and pruning method, and a check of their results
    plan         the planner's peak memory against the allocator's
    inference    HellaSwag and generation, compiled and not
    sparse24     2:4 sparse matrices against dense matrices
    train        training of the classic 124M in the remaining time: a loss curve

Each stage is a process with a time limit. Time that a stage does not use goes to the following stages. A stage that
fails, hangs, is killed or runs out of memory is recorded, and the next stage starts. results.json is written after
every stage. Repeating the call continues: finished items are kept, failed items are measured again.

    python benchmarks/gpu.py --budget 520 --out results/gpu
    python benchmarks/gpu.py --budget 300 --out results/gpu --stages precision,plan
    python benchmarks/gpu.py --tiny --out /tmp/tiny            # every stage on a CPU, with toy shapes

benchmarks/README.md describes the preparation of a machine without a network.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import machine, say
from gpu_stages.stage import FINAL, LEFT, write

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    module: str
    seconds: float
    """Time limit."""


PARTS = {
    name: Part(f"gpu_stages.{name}", seconds)
    for name, seconds in {
        "facts": 25,
        "data": 20,
        "correctness": 100,
        "speed": 150,
        "parts": 100,
        "precision": 90,
        "optimizers": 70,
        "plan": 40,
        "inference": 50,
        "sparse24": 30,
        "train": 3600,
    }.items()
}
LEAST = 8.0  # seconds; a stage does not start with less time left
TAIL = 40  # number of last log lines that results.json keeps per stage
TINY_FACTOR = 10  # factor on the time limits of a CPU


def identity(tiny: bool) -> Row:
    """Device and PyTorch version. All results in one file must have the same."""
    asks = ["import torch", "print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU')"]
    for command in (
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],  # faster than importing torch
        [sys.executable, "-c", "; ".join(asks)],
    ):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            if name := done.stdout.split("\n")[0].strip():
                return {"device": name, "torch": importlib.metadata.version("torch"), "tiny": tiny}
    raise SystemExit("PyTorch cannot be imported on this machine")


def launch(part: Part, words: list[str], log: Path, seconds: float, work: Path) -> int | None:
    """Run a stage once. Returns its exit status (negative: the signal that killed it), or None after its time limit."""
    paths = [str(ROOT / "benchmarks"), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    with open(log, "ab") as output:
        command = [sys.executable, "-m", part.module, *words, "--seconds", f"{seconds:.1f}"]
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also ends the processes that compile for the stage
            process.wait()


def read(file: Path) -> dict[str, Row]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def bury(rows: dict[str, Row], code: int | None) -> None:
    """Give an item that was running when its process ended the status timeout or killed."""
    for row in rows.values():
        if row["status"] == "running":
            since, most = row.pop("since"), row.pop("most")
            row["seconds"] = round(time.time() - since, 2)
            late = code is None or row["seconds"] >= most - 0.5
            row["status"] = "timeout" if late else "killed"
            row["error"] = f"the process ended with {code}" if not late else f"unfinished after {row['seconds']:.0f} s"


def status_of(rows: dict[str, Row], code: int | None, tail: list[str]) -> str:
    """done, timeout, killed, out_of_memory or failed."""
    statuses = [row["status"] for row in rows.values()]
    if code == 0 and statuses:
        return "done"
    if code is None or (code == LEFT and "waiting" in statuses):
        return "timeout"
    if code < 0:
        return "killed"
    ran_out = "out_of_memory" in statuses or any("out of memory" in line.lower() for line in tail)
    for status in ("failed", "killed", "timeout"):
        if status in statuses and not ran_out:
            return status
    return "out_of_memory" if ran_out else "failed"


def run_part(name: str, part: Part, rows: dict[str, Row], seconds: float, options: argparse.Namespace) -> Row:
    """Run a stage, and repeat it after a crash, until every item was tried or the time is up."""
    file, log, began = options.work / f"{name}.json", options.work / f"{name}.log", time.monotonic()
    write(file, rows)
    words = ["--out", str(file), "--work", str(options.work), *["--tiny"] * options.tiny]
    words += ["--data", str(options.data)] if options.data else []
    words += ["--hellaswag", str(options.hellaswag.resolve())] if options.hellaswag else []
    launches = 0
    while True:
        before = sum(row["status"] == "waiting" for row in rows.values()) if launches else 0
        left = seconds - (time.monotonic() - began)
        code = launch(part, [*words, *["--retry"] * (not launches)], log, left, options.work)
        launches, rows = launches + 1, read(file)
        bury(rows, code)
        write(file, rows)
        waiting = sum(row["status"] == "waiting" for row in rows.values())
        ended = code in (0, LEFT, None) or (launches > 1 and waiting >= before)
        if ended or not waiting or seconds - (time.monotonic() - began) < LEAST:
            break
        say(f"{name}: the process ended with {code}; restarting it for the {waiting} remaining items")
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
    return {
        "status": status_of(rows, code, tail),
        "seconds": round(time.monotonic() - began, 1),
        "launches": launches,
        "exit": code,
        "tail": tail,
        "items": rows,
    }


def report(results: Row) -> None:
    """Print one line for each item with a result or an error."""
    for name, stage in results["stages"].items():
        counts: dict[str, int] = {}
        for row in stage["items"].values():
            counts[row["status"]] = counts.get(row["status"], 0) + 1
        print(f"\n{name}: {stage['status']}, {stage['seconds']:.0f} s; items: {counts}")
        for item, row in stage["items"].items():
            if text := row.get("says") or (row.get("error") if row["status"] not in FINAL else ""):
                print(f"  {item}: {'' if row['status'] == 'done' else row['status'] + ': '}{text}")


def main(argv: list[str] | None = None) -> Row:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=520.0, metavar="S", help="seconds in all")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results.json goes")
    parser.add_argument("--work", type=Path, metavar="DIR", help="logs, datasets and compiled code; default OUT/work")
    parser.add_argument("--stages", metavar="A,B", default=",".join(PARTS), help="run only these stages")
    parser.add_argument("--data", type=Path, metavar="DIR", help="a prepared dataset in GPT-2's tokens to use instead")
    parser.add_argument("--hellaswag", type=Path, metavar="FILE", help="hellaswag_val.jsonl (default: synthetic rows)")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to test all stages on a CPU")
    options = parser.parse_args(argv)
    began, wanted = time.monotonic(), options.stages.split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"--stages {','.join(unknown)}: must be among {', '.join(PARTS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    options.work = (options.work or options.out / "work").resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    options.data = options.data.resolve() if options.data else None
    file, who = options.out / "results.json", identity(options.tiny)
    results = (
        json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"identity": who, "calls": [], "stages": {}}
    )
    if results["identity"] != who:
        parser.error(f"{file} has results of {results['identity']}, but this is {who}: choose another --out")
    results["calls"].append(machine() | {"budget": options.budget, "began": time.strftime("%Y-%m-%d %H:%M:%S")})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `launch` then kills the running stage

    spare = 0.0
    for name in (name for name in PARTS if name in wanted):
        before = results["stages"].get(name, {"items": {}})
        if before.get("status") == "done" and not (name == "data" and not (options.data or made(options.work))):
            say(f"{name}: already done")
            continue
        remaining = options.budget - (time.monotonic() - began)
        if remaining < LEAST:
            say(f"{name}: skipped, {max(0.0, remaining):.0f} s remain; repeat the call to run it")
            continue
        limit = PARTS[name].seconds * (TINY_FACTOR if options.tiny else 1) + spare
        say(f"{name}: limit {min(limit, remaining):.0f} s, {remaining:.0f} s remain")
        rows = {} if name == "data" else before["items"]
        try:
            row = run_part(name, PARTS[name], rows, min(limit, remaining), options)
        except SystemExit:  # SIGTERM: the results of the stage so far are kept
            rows = read(options.work / f"{name}.json")
            bury(rows, -signal.SIGTERM)
            results["stages"][name] = {"status": "killed", "seconds": 0.0, "items": rows}
            write(file, results)
            raise
        spare = max(0.0, limit - row["seconds"])
        results["stages"][name] = row
        results["seconds"] = round(time.monotonic() - began, 1)
        write(file, results)
        say(f"{name}: {row['status']}, {row['seconds']:.0f} s")
    write(file, results)
    report(results)
    return results


def made(work: Path) -> bool:
    """Whether the dataset of the stage `data` exists. It does not if results.json was copied from another machine."""
    return (work / "data" / "manifest.json").is_file()


if __name__ == "__main__":
    main()
