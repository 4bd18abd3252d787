import os

# Two test processes on two cores: threads of PyTorch's that wait for one another by spinning cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import codecs
import json
import locale
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browsers import Browser, started
from made_report import make_payload

from gptlab import machine
from gptlab.config import Recipe, build_recipe
from gptlab.data.containers import write_shard
from gptlab.data.tokenizers import make_tokenizer
from gptlab.report.page import render_page


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and shuffle the tests where GPTLAB_TEST_ORDER holds a seed.

    GPTLAB_CUDA_TESTS=cpu runs the tests marked `cuda` on a CPU, to try them. Files are shuffled, and the tests in each:
    no test may need another before it. The tests of a file stay together, as they share fixtures that take seconds.
    """
    wanted = [item for item in items if item.get_closest_marker("cuda")]
    if wanted and "GPTLAB_CUDA_TESTS" not in os.environ and not torch.cuda.is_available():
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))
    if codecs.lookup(locale.getpreferredencoding(False)).name != "utf-8":
        for item in items:
            if item.get_closest_marker("compiles"):
                item.add_marker(pytest.mark.skip(reason="PyTorch's compiler needs a locale with UTF-8"))
    if seed := os.environ.get("GPTLAB_TEST_ORDER"):
        draw = random.Random(int(seed))
        place = {path: draw.random() for path in dict.fromkeys(item.path for item in items)}
        items.sort(key=lambda item: (place[item.path], draw.random()))


SENTENCE = "the cat sat on a mat and saw that the dog had run to the house of an old man who sold red hats"
WORDS = SENTENCE.split()


def text_of(n_words: int, seed: int) -> str:
    """Sentences of a small grammar: something a tiny model learns in a hundred steps."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) + ("." if draw.random() < 0.1 else "") for _ in range(n_words))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset of characters, with end-of-text between documents, in token files without a manifest."""
    folder = tmp_path_factory.mktemp("dataset")
    documents = [text_of(40, seed) for seed in range(120)]
    tokenizer = make_tokenizer("char", lambda: iter(documents))
    for split, part in (("train", documents[:100]), ("val", documents[100:])):
        ids = [i for document in part for i in [tokenizer.eot, *tokenizer.encode(document)]]
        write_shard(folder / f"{split}.bin", np.array(ids), "nanogpt")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer.spec()), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def no_other_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else trains on the machine that the tests are on."""
    monkeypatch.setattr(machine, "other_runs", lambda: 0)


@pytest.fixture
def recipe(dataset: Path) -> Recipe:
    """A run of 24 steps that takes a moment and uses what makes resuming hard: dropout, a ragged last micro-batch."""
    return tiny_recipe(dataset)


def tiny_recipe(dataset: Path, **changes: object) -> Recipe:
    return build_recipe(
        {
            "name": "tiny",
            "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "dropout": 0.1},
            "data": {"path": str(dataset), "tokenizer": "char"},
            "batch": {"micro_batch": 3, "tokens_per_step": 256},  # 8 sequences: 3 + 3 + 2
            "optim": {"lr": 1e-2},
            "schedule": {"warmup_steps": 5, "min_lr": 1e-3},
            "train": {"max_steps": 24, "eval_every": 6, "device": "cpu"},
            "eval": {"tokens": 640, "train": True},
            "checkpoint": {"every": 4},
            "log": {"every": 1},
        },
        {key.replace("__", "."): value for key, value in changes.items()},
    )


# -- the page of a report -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started() as one:
        yield one


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    """The first study of the report that `report` opens."""
    first: dict[str, Any] = make_payload()["studies"][0]
    return first


@pytest.fixture
def report(browser: Browser) -> Iterator[Browser]:
    """The browser with the report of two studies open."""
    browser.resize(1280, 900)
    browser.open(render_page(make_payload()))
    yield browser
    assert browser.complaints() == []


@pytest.fixture
def foreign_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of this test's own for the code that transformers loads with a model, and none of another test's."""
    pytest.importorskip("transformers").logging.disable_progress_bar()
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # transformers puts the cache there
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]
