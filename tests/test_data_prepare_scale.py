"""Preparing at scale: ten thousand documents and a kill, memory, and two epochs of what was prepared."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS, tiny_recipe

from gptlab.data.containers import write_shard
from gptlab.data.prepare import prepare
from gptlab.data.shards import Dataset
from gptlab.tasks.lm import LanguageModelling, TextData


def write_documents(path: Path, count: int, words: int) -> Path:
    """A jsonl file of documents of some length, no two alike."""
    draw = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            text = " ".join(draw.choices(WORDS, k=draw.randrange(words // 2, words)))
            file.write(json.dumps({"text": f"Document {index}. {text}"}) + "\n")
    return path


def sha256s(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.*"))}


@pytest.mark.slow
def test_ten_thousand_documents_whatever_the_workers_and_the_kills(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "documents.jsonl", 10_000, 500)

    def start(out: str, workers: int) -> subprocess.Popen[bytes]:
        words = f"prepare {source} --out {tmp_path / out} --shard-tokens 150000 --workers {workers}"
        return subprocess.Popen([sys.executable, "-m", "gptlab", *words.split()])

    for out, workers in (("one", 1), ("two", 2)):
        assert start(out, workers).wait() == 0
    whole = sha256s(tmp_path / "one")
    assert len(whole) > 15
    assert sum(split["documents"] for split in Dataset(tmp_path / "one").manifest["splits"].values()) == 10_000
    assert sha256s(tmp_path / "two") == whole

    finished: dict[Path, tuple[int, int]] = {}
    for kill in (3, 6):  # shards that are there when it comes
        process = start("killed", 2)
        while process.poll() is None and len(list((tmp_path / "killed").glob("train-*.bin"))) < kill:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "killed" / "manifest.json").exists()
        for path in (tmp_path / "killed").glob("*.bin"):
            finished.setdefault(path, (path.stat().st_ino, path.stat().st_mtime_ns))
    assert len(finished) >= 6
    assert start("killed", 2).wait() == 0
    assert sha256s(tmp_path / "killed") == whole
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in finished} == finished  # never done again


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_memory_does_not_grow_with_the_documents(tmp_path: Path, workers: int) -> None:
    code = (
        "import sys\nfrom gptlab.data.prepare import pipeline\nfrom gptlab.machine import peak_memory_since\n"
        "pipeline.BATCH_CHARACTERS = 2**17\n"  # so that the fewer documents are many batches as well
        "pipeline.prepare(sys.argv[1], out=sys.argv[2], workers=int(sys.argv[3]), shard_tokens=10**6, progress=False)\n"
        "print(peak_memory_since())"  # not of the process that starts it
    )
    peak = []
    for count in (2_000, 20_000):
        source = write_documents(tmp_path / f"{count}.jsonl", count, 600)
        command = [sys.executable, "-c", code, str(source), str(tmp_path / str(count)), str(workers)]
        made = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peak.append(int(made))
    assert source.stat().st_size > 30e6
    assert peak[1] - peak[0] < 6e6, peak


def test_two_epochs_of_training_across_shards_and_resumed_between(tmp_path: Path) -> None:
    """Every window exactly twice, in another order; a run that begins in the middle goes on exactly there."""
    sizes, first = [700, 0, 1, 1300, 33, 520], 0
    for index, size in enumerate(sizes):
        write_shard(tmp_path / f"train-{index:06d}.bin", np.arange(first, first + size))
        first += size
    write_shard(tmp_path / "val-000000.bin", np.arange(100))
    (tmp_path / "tokenizer.json").write_text('{"kind": "byte"}', encoding="utf-8")
    recipe = tiny_recipe(tmp_path, model__vocab_size=4096, model__block_size=32)  # 8 sequences a step: 3 + 3 + 2

    def batches(begin: int, end: int) -> torch.Tensor:
        task = LanguageModelling(recipe, TextData([Dataset(tmp_path)]), torch.device("cpu"), tmp_path)
        rows = [
            torch.cat([x, y[:, -1:]], dim=1)
            for step in range(begin, end)
            for x, y, _ in task.micro_batches(step, micro_batch=3)
        ]
        return torch.cat(rows)

    n = (sum(sizes) - 1) // 32
    assert n == 79
    seen = batches(0, 20)[: 2 * n]  # (158, 33); the last two sequences of 20 steps belong to a third epoch
    starts = seen[:, :1]
    assert torch.equal(seen, starts + torch.arange(33))  # ids count up, so this is a window whole and at its place
    for epoch in (starts[:n], starts[n:]):
        assert sorted(epoch.flatten().tolist()) == [32 * index for index in range(n)]
    assert (starts[:n] == starts[n:]).float().mean() < 0.2
    borders = np.cumsum(sizes)
    assert any(starts[0] < border < starts[0] + 33 for starts in starts.tolist() for border in borders)
    for step in (5, 10, 17):  # the border of the epochs is within step 9
        assert torch.equal(batches(step, 20)[: 2 * n - 8 * step], seen[8 * step :])


def test_a_prepared_corpus_trains_as_one_stream(tmp_path: Path) -> None:
    """The same text in one shard and in many gives the same batches."""
    source = write_documents(tmp_path / "documents.jsonl", 60, 40)
    seen = []
    for shard_tokens in (10**6, 777):
        out = prepare(
            str(source), out=tmp_path / str(shard_tokens), tokenizer="byte", shard_tokens=shard_tokens, progress=False
        )
        recipe = tiny_recipe(out, data__tokenizer="byte", model__vocab_size=257)
        task = LanguageModelling(recipe, TextData([Dataset(out)]), torch.device("cpu"), tmp_path)
        seen.append(torch.cat([x for step in range(60) for x, _, _ in task.micro_batches(step, 3)]))
    assert len(Dataset(out).train.shards) > 5
    assert torch.equal(seen[0], seen[1])
