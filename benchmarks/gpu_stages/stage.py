"""Shared by the stages of `gpu.py`: items that are measured one by one, and a file with the results so far.

A stage names its items and measures them in turn. The JSON file is written before and after each item, so results are
kept however the process ends. An item that raises an error is recorded, and the next item is measured. An item that
hangs ends the process, with a traceback in the log; so does an error that breaks the CUDA context. `gpu.py` then starts
the stage again for the remaining items.

torch is imported only when an item needs it.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import spread

from gptlab.hardware import gpu_of

Row = dict[str, Any]
FINAL = ("done", "not_applicable")  # statuses of items that are not measured again
LEFT, BROKEN = 3, 70  # exit statuses: some items are left; the CUDA context is broken
END = 2.0  # the stage ends itself this many seconds before its limit, so that the log is complete


class NotHere(Exception):
    """An item that this machine cannot measure. The message gives the reason."""


def plain(content: Any) -> Any:
    """The content with NaN and infinity, which JSON does not have, as strings."""
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [plain(value) for value in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content


def write(path: Path, content: Any) -> None:
    """Write JSON such that readers see either the old or the new content as a whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(plain(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


class Stage:
    """The items of a stage and the time left for them.

    Attributes:
        tiny: whether to measure toy shapes, to test the stage on a CPU.
        rows: results of each item. "status" is waiting, running, done, not_applicable, failed or out_of_memory;
            `gpu.py` sets timeout or killed for an item that was running when the process ended.
    """

    def __init__(self, argv: Sequence[str] | None = None) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the stage's JSON file")
        parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where datasets and runs go")
        parser.add_argument("--seconds", type=float, default=600.0, help="the stage's limit")
        parser.add_argument("--data", type=Path, metavar="DIR", help="a dataset in GPT-2's tokens")
        parser.add_argument("--hellaswag", type=Path, metavar="FILE", help="hellaswag_val.jsonl")
        parser.add_argument("--retry", action="store_true", help="measure failed items again")
        parser.add_argument("--tiny", action="store_true", help="toy shapes, on a CPU")
        given = parser.parse_args(argv)
        self.out, self.work, self.tiny, self.retry = given.out, given.work, given.tiny, given.retry
        self.hellaswag: Path | None = given.hellaswag
        self.data: Path = given.data or given.work / "data"
        self.ends = time.monotonic() + given.seconds - END
        self.rows: dict[str, Row] = json.loads(self.out.read_text(encoding="utf-8")) if self.out.is_file() else {}
        self.work.mkdir(parents=True, exist_ok=True)
        self.log = os.fdopen(os.dup(2), "w")  # a copy of stderr, as pytest replaces sys.stderr

    def left(self) -> float:
        """Seconds until the stage must end."""
        return self.ends - time.monotonic()

    def save(self) -> None:
        write(self.out, self.rows)

    def todo(self, names: Sequence[str]) -> list[str]:
        """Declare the items. Returns the items to measure, those that were never tried first."""
        for name in names:
            self.rows.setdefault(name, {"status": "waiting"})
        self.save()
        waiting = [name for name in names if self.rows[name]["status"] == "waiting"]
        again = [name for name in names if self.rows[name]["status"] not in ("waiting", *FINAL)]
        return waiting + (again if self.retry else [])

    def begin(self, name: str, most: float) -> None:
        """Start an item. The process ends if the item takes longer than `most` seconds."""
        most = max(1.0, min(most, self.left()))
        self.rows[name] = {"status": "running", "since": time.time(), "most": most}
        self.save()
        faulthandler.dump_traceback_later(most, exit=True, file=self.log)

    def note(self, name: str, **facts: Any) -> None:
        """Store intermediate results of a running item."""
        self.rows[name] |= facts
        self.save()

    def end(self, name: str, status: str, **facts: Any) -> None:
        faulthandler.cancel_dump_traceback_later()
        row = self.rows[name]
        seconds = time.time() - row.pop("since")
        row.pop("most")
        self.rows[name] = {**row, "status": status, "seconds": round(seconds, 2), **facts}
        self.save()
        says = facts.get("says") or facts.get("error") or ""
        print(f"{name}: {status}, {seconds:.1f} s. {says}", file=self.log, flush=True)

    def measure(self, name: str, action: Callable[[], Row], most: float = 90.0) -> None:
        """Measure an item and record its result. `says` in the result is a sentence for the reader."""
        self.begin(name, most)
        broken = False
        try:
            self.end(name, "done", **action())
        except (Exception, SystemExit) as error:
            status = status_of(error)
            if status == "failed":
                traceback.print_exc()
            tail = [] if status == "not_applicable" else traceback.format_exc().splitlines()[-12:]
            self.end(name, status, error=f"{type(error).__name__}: {first_line(error)}", traceback=tail)
            broken = type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)
        if broken:
            print(f"{name} broke the CUDA context: the remaining items need a new process", flush=True)
            os._exit(BROKEN)
        let_go()

    def all(self, items: dict[str, Callable[[], Row]], expects: float = 5.0, most: float = 90.0) -> None:
        """Measure all items for which there is time.

        Args:
            items: name -> function that returns the result.
            expects: seconds that an item needs. An item does not start with less time left.
            most: seconds after which an item counts as hanging.
        """
        for name in self.todo(list(items)):
            if self.left() < expects:
                print(f"{name}: skipped, {max(0.0, self.left()):.0f} s remain", flush=True)
                return
            self.measure(name, items[name], most)

    def status(self) -> int:
        """The exit status: 0 if all items are final, else LEFT."""
        return 0 if all(row["status"] in FINAL for row in self.rows.values()) else LEFT


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def status_of(error: BaseException) -> str:
    """The status of an item that raised this exception."""
    name = type(error).__name__
    if name in ("NotHere", "NotApplicable"):
        return "not_applicable"
    ran_out = name in ("OutOfMemoryError", "MemoryError") or "out of memory" in str(error)
    return "out_of_memory" if ran_out else "failed"


def let_go() -> None:
    """Free the memory of the last item."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def run(main: Callable[[Stage], None]) -> None:
    """Run a stage as a program."""
    stage = Stage()
    main(stage)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(stage.status())  # does not wait for threads of a compiler or of NCCL


# -- tools for measuring, which import torch ------------------------------------------------------------------------


def pick(stage: Stage) -> Any:
    """The GPU; without a GPU the CPU, for toy shapes only."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    if not stage.tiny:
        raise SystemExit("there is no GPU. Use --tiny to test the stages on a CPU")
    return torch.device("cpu")


def synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(action: Callable[[], object], device: Any, runs: int = 10, warmup: int = 3) -> list[float]:
    """Milliseconds of each of several calls, measured by CUDA events on a GPU."""
    import torch

    for _ in range(warmup):
        action()
    synchronize(device)
    times = []
    for _ in range(runs):
        if device.type == "cuda":
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            action()
            b.record()
            times.append((a, b))
        else:
            began = time.perf_counter()
            action()
            times.append(1e3 * (time.perf_counter() - began))
    synchronize(device)
    return [pair if isinstance(pair, float) else pair[0].elapsed_time(pair[1]) for pair in times]


def rate(times: Sequence[float], amount: float) -> dict[str, float]:
    """Spread of amount per second in units of 1e12, for times in milliseconds."""
    return spread([amount / (1e9 * t) for t in times])


def peak_of(device: Any, kind: Any = "bf16") -> float | None:
    """Peak FLOP/s of the device in a format, or None if it is unknown."""
    gpu = gpu_of(device)
    return gpu.peak(kind) if gpu else None


KERNELS = (  # classes of CUDA kernels, by parts of their names; the first match counts
    ("attention", ("sdpa", "flash", "fmha", "attention")),
    ("optimizer", ("adam", "multi_tensor", "foreach", "sgd")),
    ("gemm", ("gemm", "cutlass", "nvjet", "cublas", "sm80_x", "sm90_x", "splitk", "wgmma", "::mm", "addmm", "::bmm")),
    ("cross-entropy", ("cross_entropy", "logsumexp", "scatter", "aminmax", "softmax", "nll")),
    ("norm and elementwise", ("triton", "elementwise", "layer_norm", "rms_norm", "reduce", "embedding", "index")),
    ("copies", ("memcpy", "memset", "copy", "cat")),
)


def kernel_class(name: str) -> str:
    lower = name.lower()
    if lower.startswith("mem"):
        return "copies"
    if lower.startswith("triton_tem"):
        return "gemm"
    if lower.startswith("triton"):  # Inductor's names list what a kernel fuses
        words = ("logsumexp", "softmax", "nll", "scatter", "amax", "aminmax", "exp_", "gather")
        loss = any(word in lower for word in words)
        return "cross-entropy" if loss else "norm and elementwise"
    return next((kind for kind, words in KERNELS if any(word in lower for word in words)), "other")


def kernels_of(action: Callable[[], object], device: Any, times: int = 1, top: int = 25) -> Row:
    """Milliseconds of an action by kernel class, and its longest kernels; on a CPU, operations instead of kernels."""
    import torch

    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    synchronize(device)
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA] if cuda else [activity.CPU]) as profiler:
        for _ in range(times):
            action()
        synchronize(device)
    found = []
    for event in profiler.key_averages():
        if event.device_type.name != ("CUDA" if cuda else "CPU") or getattr(event, "is_user_annotation", False):
            continue
        spent = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000 / times
        found.append(
            {"kernel": event.key[:160], "class": kernel_class(event.key), "calls": event.count / times, "ms": spent}
        )
    classes: dict[str, float] = {}
    for kernel in found:
        classes[kernel["class"]] = classes.get(kernel["class"], 0.0) + kernel["ms"]
    return {
        "ms": sum(classes.values()),
        "by_class_ms": dict(sorted(classes.items(), key=lambda item: -item[1])),
        "kernels": sorted(found, key=lambda kernel: -kernel["ms"])[:top],
    }
