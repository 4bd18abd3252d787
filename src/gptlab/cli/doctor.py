"""gptlab doctor"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptlab.cli.common import add_json, add_verb, json_too
from gptlab.hardware import GB
from gptlab.progress import Progress
from gptlab.version import VERSION

RECIPE = "shakespeare-char-cpu"
CHARACTERS = 65  # of Shakespeare, so that the recipe need not be prepared
LIBRARIES = ("numpy", "tokenizers", "tiktoken", "safetensors", "pydantic", "transformers")
FORMATS = {"AVX2": "avx2", "AVX-512": "avx512f", "bf16": "avx512_bf16", "AMX": "amx_bf16"}  # by /proc/cpuinfo's flags


def add_to(verbs: Any) -> None:
    help = "Say what this machine has: versions, devices, optional packages, disk, and how fast it trains."
    v = add_verb(verbs, "doctor", do_doctor, help)
    v.add_argument("--seconds", type=float, default=10.0, metavar="X", help="for the speed test (default: 10; 0: none)")
    add_json(v)


def do_doctor(options: argparse.Namespace) -> None:
    found: dict[str, str] = {}
    known = facts(options.seconds)
    with json_too(options.json) as tell:
        while True:
            with Progress("looking at this machine"):
                one = next(known, None)
            if one is None:
                break
            name, value = one
            found[name] = value
            print(f"{name:15} {value}", flush=True)
        tell(found)


def facts(seconds: float) -> Iterator[tuple[str, str]]:
    """(what, its state), each as soon as it is known."""
    yield "gptlab", f"{VERSION}, Python {platform.python_version()}, {platform.platform()}"
    from gptlab.hardware import cpu_facts, processor_name
    from gptlab.machine import cores, free_memory, spin_less

    spin_less(os.environ)  # as training does, before PyTorch is loaded
    import torch

    yield "PyTorch", f"{torch.__version__}, {torch.get_num_threads()} threads"
    flags = cpu_facts().get("flags", "").split()
    has = [name for name, flag in FORMATS.items() if flag in flags]
    memory = f"{free_memory() / GB:.1f} GB of memory free"
    yield "CPU", f"{processor_name()}, {cores()} cores, {', '.join([*has, memory])}"
    yield from _gpus()
    versions = [f"{name} {version}" for name in LIBRARIES if (version := _version(name))]
    yield "packages", ", ".join(versions)
    for extra, missing in sorted(missing_packages().items()):
        yield f"no {extra}", f"{', '.join(missing)}; `pip install 'gptlab[{extra}]'` adds it"
    free = shutil.disk_usage(Path.cwd()).free / GB
    yield "disk", f"{free:,.1f} GB free in {Path.cwd()}"
    if seconds > 0:
        yield "speed", _speed(seconds)


def _gpus() -> Iterator[tuple[str, str]]:
    import torch

    from gptlab.hardware import gpu_of

    if not torch.cuda.is_available():
        for_cpu = torch.version.cuda is None and torch.version.hip is None
        built = "this PyTorch is a CPU build" if for_cpu else "none found"
        yield "GPU", f"none: {built}"
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        free, total = torch.cuda.mem_get_info(device)
        known = "" if gpu_of(device) else "; gptlab has no peak FLOP/s of it, so no MFU"
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        yield (
            f"GPU {index}",
            (
                f"{torch.cuda.get_device_name(device)}, {free / GB:.1f} of {total / GB:.1f} GB free, {bf16}, "
                f"CUDA {torch.version.cuda or torch.version.hip}{known}"
            ),
        )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def missing_packages() -> dict[str, list[str]]:
    """For each extra of gptlab that users install, the packages of it that are not there."""
    missing: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("gptlab") or []:
        package, extra = re.match(r"[\w.-]+", requirement), re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if package and extra and extra[1] != "dev" and not _version(package[0]):
            missing.setdefault(extra[1], []).append(package[0])
    return missing


def _speed(seconds: float) -> str:
    """How long a known recipe takes here."""
    from gptlab.config import load_recipe
    from gptlab.machine import is_busy
    from gptlab.planning.measure import measure_speed
    from gptlab.planning.shape import Shape

    recipe = load_recipe(RECIPE, {"model.vocab_size": CHARACTERS})
    batch = recipe.batch.micro_batch
    assert isinstance(batch, int)
    shape = Shape(recipe.model, recipe.precision, 0)
    tokens = measure_speed(recipe, shape, batch, seconds).tokens
    needed = recipe.train.max_steps * recipe.batch.tokens_per_step / tokens
    crowd = "; other programs are using these cores" if is_busy() else ""
    return f"{tokens:,.0f} tokens a second on the CPU: {RECIPE} takes about {needed:,.0f} s here{crowd}"
