"""Checkpoints: a folder a step, in safetensors and JSON, that is either whole or not there.

    step-00000500/  model.safetensors  optimizer.safetensors  [sparsity.safetensors]  training.json  manifest.json

Tensors are copied before training goes on; a thread writes the copies. Everything is written into a hidden folder,
manifest.json with the sha256 of each file last, and then renamed, so that a kill at any moment leaves whole
checkpoints only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gptlab.optim.optimizers import plain_tensors
from gptlab.rundir import RunDir, RunError, write_atomically
from gptlab.sparsity.pruner import Pruner


def list_checkpoints(run: RunDir) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in run.checkpoints.glob("step-*") if (path / "manifest.json").is_file())


def verify(path: Path) -> None:
    """Raise RunError where a file of a checkpoint is missing or is not the one that was written."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, digest in manifest["sha256"].items():
            with open(path / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise RunError(f"checkpoint {path} is damaged: {name} is not what was written")
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise RunError(f"checkpoint {path} is damaged: {error}") from None


def find_checkpoint(run: RunDir, which: str = "last") -> Path:
    """The checkpoint called last, best (lowest val_loss among those written) or by its step.

    Raises:
        RunError: there is none, or it is damaged.
    """
    found = list_checkpoints(run)
    if not found:
        raise RunError(f"{run.path} has no checkpoint")
    if which == "last":
        path = found[-1]
    elif which == "best":
        path = best_checkpoint(found) or found[-1]
    else:
        steps = {int(p.name.removeprefix("step-")): p for p in found}
        if not which.isdigit() or int(which) not in steps:
            raise RunError(f"{run.path} has no checkpoint {which}: last, best or one of {', '.join(map(str, steps))}")
        path = steps[int(which)]
    verify(path)
    return path


def best_checkpoint(paths: list[Path]) -> Path | None:
    """The one with the lowest val_loss among those that were evaluated at their step."""
    losses = {p: json.loads((p / "training.json").read_text()).get("val_loss") for p in paths}
    scored = [p for p in paths if losses[p] is not None]
    return min(scored, key=lambda p: losses[p]) if scored else None


# -- the optimizer's state by the names of the parameters


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{"exp_avg/h.0.mlp.c_fc.weight": tensor, ...}: all the optimizer keeps, as `plain_tensors`, by its parameter.

    What it keeps of all of them together stands in `optimizer.state` under a name, and here under the same.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{kind}/{p if isinstance(p, str) else names[id(p)]}": tensor
        for p, state in optimizer.state.items()
        for kind, tensor in plain_tensors(state).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimizer the state that `optimizer_tensors` named.

    Raises:
        RunError: 8-bit moments of another library than this optimizer's.
    """
    kinds = {key.split("/", 1)[0] for key in tensors}
    library = "bitsandbytes" if "state1" in kinds else "torchao" if "exp_avg.codes" in kinds else ""
    if not type(optimizer).__module__.startswith(library):
        raise RunError(f"the moments are in 8 bits of {library}: this run goes on only on the device it began on")
    parameters = dict(model.named_parameters())
    quantized: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        kind, _, part = kind.partition(".")
        p = parameters.get(name)
        state = optimizer.state[name if p is None else p]  # type: ignore[index]
        if part == "int":
            state[kind] = int(value)
        elif p is None:
            state[kind] = value  # the optimizer takes it to its device
        elif part:
            quantized.setdefault((name, kind), {})[part] = value.to(p.device)
        elif kind == "step" and not optimizer.defaults.get("fused"):
            state[kind] = value  # on the CPU; fused AdamW alone counts beside the weights
        else:
            state[kind] = value.to(p.device)
    for (name, kind), parts in quantized.items():
        from torchao.optim.subclass_8bit import OptimState8bit

        p, signed = parameters[name], bool(parts["qmap"].min() < 0)
        optimizer.state[p][kind] = OptimState8bit(**parts, signed=signed, dtype=p.dtype)


class Checkpoints:
    """Saves and restores the state of a run.

    Args:
        run: where to.
        keep_last: newest checkpoints kept.
        keep_best: keep the best one besides.
    """

    def __init__(self, run: RunDir, keep_last: int, keep_best: bool) -> None:
        self.run, self.keep_last, self.keep_best = run, keep_last, keep_best
        self.writer: threading.Thread | None = None
        self.error: BaseException | None = None
        for leftover in run.checkpoints.glob("*step-*"):  # of a process that was killed while it wrote or removed one
            if leftover not in list_checkpoints(run):
                shutil.rmtree(leftover)

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        progress: dict[str, Any],
        pruner: Pruner | None = None,
    ) -> None:
        """Copy the state and write it in the background. An error of the last write is raised here or by `wait`.

        Args:
            optimizer: None for a model that was trained elsewhere.
            progress: what is not a tensor, "step" among it; training.json holds it.
            pruner: None for a dense model.
        """
        self.wait()
        tensors = {"model": model.state_dict(), "optimizer": optimizer_tensors(model, optimizer) if optimizer else {}}
        if pruner:
            tensors["sparsity"] = pruner.tensors()
        copies = {file: {name: _host_copy(t) for name, t in of.items()} for file, of in tensors.items()}
        # not a daemon: a process that ends of itself ends its checkpoint first
        self.writer = threading.Thread(target=self._write, args=(f"step-{progress['step']:08d}", copies, progress))
        self.writer.start()

    def wait(self) -> None:
        """Until the last checkpoint is on the disk."""
        if self.writer is not None:
            self.writer.join()
            self.writer = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _write(self, name: str, tensors: dict[str, dict[str, Tensor]], progress: dict[str, Any]) -> None:
        try:
            temporary, final = self.run.checkpoints / f".{name}", self.run.checkpoints / name
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            for kind, content in tensors.items():
                save_file(content, temporary / f"{kind}.safetensors")
            (temporary / "training.json").write_text(json.dumps(progress, indent=2))
            digests = {}
            for path in sorted(temporary.iterdir()):
                with open(path, "rb+") as file:
                    digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
                    os.fsync(file.fileno())
            write_atomically(temporary / "manifest.json", json.dumps({"version": 1, "sha256": digests}, indent=2))
            shutil.rmtree(final, ignore_errors=True)  # a step that is saved again after a damaged file
            os.replace(temporary, final)
            self._prune()
        except BaseException as error:
            self.error = error

    def _prune(self) -> None:
        found = list_checkpoints(self.run)
        kept = set(found[-self.keep_last :])
        if self.keep_best and (best := best_checkpoint(found)):
            kept.add(best)
        for path in found:
            if path not in kept:
                (path / "manifest.json").unlink()  # from here on it is no checkpoint, should the removal be cut short
                shutil.rmtree(path)

    def restore(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner | None = None
    ) -> dict[str, Any] | None:
        """Load the newest checkpoint that is whole; its training.json, or None where there is none.

        Raises:
            RunError: there are checkpoints and every one is damaged.
        """
        damage: RunError | None = None
        for path in reversed(list_checkpoints(self.run)):
            try:
                verify(path)
            except RunError as error:
                damage = damage or error
                continue
            model.load_state_dict(load_file(path / "model.safetensors"))
            load_optimizer_tensors(model, optimizer, load_file(path / "optimizer.safetensors"))
            if pruner:
                pruner.load_tensors(load_file(path / "sparsity.safetensors"))
            state: dict[str, Any] = json.loads((path / "training.json").read_text())
            return state
        if damage:
            raise damage
        return None


def _host_copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().to("cpu", copy=True)
    return copy.contiguous()
