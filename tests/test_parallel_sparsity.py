"""Every way of pruning on the rows that FSDP leaves a process, against one process that has all of them.

Weights and gradients are multiples of a power of two, few of them, so that many scores are equal and none is rounded:
masks and weights are the same to the bit. All cases go through one start of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from processes import together
from torch import Tensor

from gptlab.config import Model, Sparsity
from gptlab.distributed.shard import LocalShards, Weights, global_shape, local_rows, shard_spec
from gptlab.distributed.world import World, process_group
from gptlab.distributed.wrap import shard
from gptlab.model.gpt import build_model
from gptlab.seeding import address
from gptlab.sparsity import selection
from gptlab.sparsity.masks import pack, unpack
from gptlab.sparsity.pruner import Pruner

pytestmark = pytest.mark.xdist_group("parallel_sparsity")  # they share processes that take seconds to start

# of 4 processes one has no rows of c_fc's 9 and of the head's 9; no row of a mask fills whole bytes
SHAPE = Model(n_layer=2, n_head=2, n_embd=12, mlp_width=9, block_size=4, vocab_size=9)
FOURS = SHAPE.model_copy(update={"mlp_width": 20})
CASES: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude", "head": True},
    "magnitude by layer": {"method": "magnitude", "scope": "layer", "head": True},
    "magnitude in parts": {"method": "magnitude", "target": 0.9},
    "state": {"method": "state", "variant": "bitter0"},
    "bitter3": {"method": "state", "variant": "bitter3"},
    "movement": {"method": "movement"},
    "movement by layer": {"method": "movement", "scope": "layer", "head": True},
    "distance": {"method": "movement", "movement": "distance"},
    "rigl": {"method": "rigl"},
    "2:4": {"method": "2:4", "target": 0.5},
}


def sparsity_of(name: str) -> Sparsity:
    return Sparsity(**{"target": 0.6, "every": 4, "begin": 0.2, "end": 0.8, **CASES[name]})


def shape_of(name: str) -> Model:
    return FOURS if name == "2:4" else SHAPE


def drawn(p: Tensor, *where: object) -> Tensor:
    draw = torch.Generator().manual_seed(address(*where))
    return local_rows(torch.randint(-4, 5, tuple(global_shape(p)), generator=draw) / 8, p)


def prune(weights: Weights, name: str) -> dict[str, Any]:
    """20 steps; step 12, with an infinite gradient in one place, is skipped as loss scaling would."""
    with torch.no_grad():
        for i, p in enumerate(weights.parameters()):
            p.copy_(drawn(p, "weights", i))
    parameters = list(weights.parameters())
    optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=0.25)
    if name in ("state", "bitter3"):
        optimizer = torch.optim.AdamW(parameters, lr=0.03, foreach=True)
    # not in one piece: a part ends in the midst of a matrix
    selection.PART = 7 if name == "magnitude in parts" else 2**20
    pruner = Pruner(weights, optimizer, sparsity_of(name), 20, 7, every_update=name == "magnitude in parts")
    found: dict[str, Any] = {}
    for step in range(20):
        for i, p in enumerate(parameters):
            p.grad = drawn(p, step, i)
        torch._foreach_mul_([p.grad for p in parameters], 2.0)
        if step == 12:
            spread = shard_spec(parameters[0])
            if spread is None or spread.group.rank() == 0:
                parameters[0].grad[0] = math.inf
        pruner.before_update(step)
        if step != 12:
            optimizer.step()
        pruner.after_update(step + 1)
        facts = pruner.changed_at, pruner.changes, pruner.sparsity(), pruner.by_layer(), pruner.mask_bytes()
        found[f"facts/{step}"] = facts
        if step == 13:  # once more from what a checkpoint holds
            kept, flat = {key: t.clone() for key, t in pruner.tensors().items()}, {}
            for key, p in pruner.parameters.items():
                mask = torch.from_numpy(whole(weights, pruner)[f"mask/{key}"])
                flat[f"mask/{key}"] = pack(unpack(mask, global_shape(p)).flatten())  # as they were stored once
            pruner = Pruner(weights, optimizer, sparsity_of(name), 20, 7, pruner.every_update)
            for stored in ({**kept, **flat}, kept):
                pruner.load_tensors(stored)
                assert all(torch.equal(t, kept[key]) for key, t in pruner.tensors().items())
        if step in (13, 19):
            found |= {f"{key}/{step}": value for key, value in whole(weights, pruner).items()}
    return found


def whole(weights: Weights, pruner: Pruner) -> dict[str, np.ndarray]:
    """Weights and what the pruner keeps, of whole tensors."""
    parameters = dict(weights.named_parameters())
    found = {}
    for key, t in {**{f"weight/{name}": p.detach() for name, p in parameters.items()}, **pruner.tensors()}.items():
        spread = None if key == "changed" else shard_spec(parameters[key.split("/")[1]])
        found[key] = (t.clone() if spread is None else spread.all_gather(t)).numpy()
    return found


def of_shards(names: list[str]) -> dict[str, Any]:
    """In each process."""
    found = {}
    with process_group("fsdp", torch.device("cpu")) as world:
        for name in names:
            weights = sharded(shape_of(name), world)
            found[name] = prune(weights, name)
            found[name]["empty"] = {key for key, p in weights.named_parameters() if not len(p)}
    return found


def sharded(shape: Model, world: World) -> LocalShards:
    model = build_model(shape, init=0)
    shard(model, world, 0, torch.device("cpu"), None)
    return LocalShards(model)


def assert_equal(name: str, several: list[dict[str, Any]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "PART", selection.PART)  # and put back
        one = prune(build_model(shape_of(name), init=0), name)
    for found in several:
        assert found.keys() - {"empty"} == one.keys()
        for key, value in one.items():
            if key.startswith("facts"):
                assert found[key] == value, key
            else:
                np.testing.assert_array_equal(found[key], value, err_msg=key)
    # what was compared is not all zeros
    shapes = {key: p.shape for key, p in build_model(shape_of(name)).named_parameters()}
    masks = {key[5:-3]: torch.from_numpy(t) for key, t in one.items() if key.startswith("mask/") and key.endswith("19")}
    count = sum(int(unpack(mask, shapes[key]).sum()) for key, mask in masks.items())
    n = sum(shapes[key].numel() for key in masks)
    share = sparsity_of(name).target
    assert 0 <= share * n - count < (len(masks) if "layer" in name or name == "rigl" else 1)
    assert one["facts/19"][2] == count / n
    changed = {one[f"facts/{step}"][0] for step in range(20)}
    assert changed == {"rigl": {0, 4, 8}, "2:4": {0, 4}}.get(name, {0, 8, 12, 16})


@pytest.fixture(scope="session")
def two() -> Iterator[list[dict[str, Any]]]:
    yield together(2, of_shards, list(CASES))


@pytest.fixture(scope="session")
def four() -> Iterator[list[dict[str, Any]]]:
    yield together(4, of_shards, list(CASES), seconds=500)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_mask_what_one_does(name: str, two: list[dict[str, Any]]) -> None:
    assert_equal(name, [found[name] for found in two])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_four_processes_of_which_one_has_no_rows(name: str, four: list[dict[str, Any]]) -> None:
    assert_equal(name, [found[name] for found in four])
    assert name == "2:4" or {"h.0.mlp.c_fc.weight", "wte.weight"} <= four[3][name]["empty"]
