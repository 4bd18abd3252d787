"""From documents to shards: what is written, restarts, splits, and every refusal."""

import errno
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interrupted import Killed, killed_before

from gptlab import progress
from gptlab.config import Data
from gptlab.data import containers
from gptlab.data.containers import read_shard
from gptlab.data.corpora import TEXT, base, open_corpus
from gptlab.data.corpora import text as corpora
from gptlab.data.prepare import folder as prepare_folder
from gptlab.data.prepare import pipeline, prepare
from gptlab.data.prepare.writer import Piece, ShardWriter
from gptlab.data.shards import Dataset, Tokens
from gptlab.errors import DataError, UserError


def quietly(corpus: str, out: Path, **settings: Any) -> Path:
    return prepare(corpus, **{"out": out, "tokenizer": "byte", "workers": 1, "progress": False, **settings})


def documents(count: int) -> list[str]:
    return [f"Document {index}: " + f"na\u00efve word {index * index} " * (index % 7 + 1) for index in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """100 text files of some 20 to 130 bytes."""
    (tmp_path / "docs").mkdir()
    for index, text in enumerate(documents(100)):
        (tmp_path / "docs" / f"{index:03d}.txt").write_text(text, encoding="utf-8")
    return tmp_path / "docs"


def ids(tokens: Tokens) -> list[int]:
    result: list[int] = tokens.gather(np.array([0]), len(tokens))[0].tolist()
    return result


def texts_of(tokens: Tokens) -> list[str]:
    """The documents of a split made with the byte tokenizer, end-of-text prepended."""
    stream = ids(tokens)
    starts = [position for position, index in enumerate(stream) if index == 256]
    assert starts[0] == 0
    return [bytes(stream[a + 1 : b]).decode() for a, b in zip(starts, [*starts[1:], len(stream)], strict=True)]


def digests(path: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.iterdir())
        if file.suffix in (".bin", ".npy", ".json")
    }


# -- what is written


def test_documents_are_split_and_delimited(folder: Path, tmp_path: Path) -> None:
    dataset = Dataset(quietly("text", tmp_path / "set", source=folder))
    train, val = texts_of(dataset.train), texts_of(dataset.val)
    assert sorted(train + val) == sorted(documents(100))
    assert train == [text for text in documents(100) if text not in val]  # the order is kept
    assert len(val) == 5  # one of every 20
    assert all(any(text in val for text in documents(100)[block : block + 20]) for block in range(0, 100, 20))
    for split, texts in (("train", train), ("val", val)):
        entry = dataset.manifest["splits"][split]
        assert entry["documents"] == len(texts)
        assert entry["bytes"] == sum(len(text.encode()) for text in texts)
        assert entry["tokens"] == entry["bytes"] + entry["documents"]
        assert [shard["sha256"] for shard in entry["shards"]] == [
            hashlib.sha256((tmp_path / "set" / shard["file"]).read_bytes()).hexdigest() for shard in entry["shards"]
        ]


def test_the_manifest_says_what_was_done(folder: Path, tmp_path: Path) -> None:
    manifest = Dataset(quietly("text", tmp_path / "set", source=folder, shard_tokens=1000)).manifest
    assert manifest["format"] == "llmc"
    assert manifest["corpus"] == "text"
    assert manifest["dtype"] == "uint16"
    assert manifest["source"]["path"] == str(folder)
    assert manifest["source"]["files"] == 100
    sha256 = hashlib.sha256((tmp_path / "set" / "tokenizer.json").read_bytes()).hexdigest()
    assert manifest["tokenizer"] == {
        "name": "byte",
        "vocab_size": 257,
        "eot": 256,
        "file": "tokenizer.json",
        "sha256": sha256,
    }
    assert manifest["settings"] == {
        "shard_tokens": 1000,
        "end_of_text": "prepended",
        "val_fraction": None,
        "val_tokens": 0,
        "text_field": "text",
        "max_documents": None,
    }
    sizes = [shard["tokens"] for shard in manifest["splits"]["train"]["shards"]]
    assert set(sizes[:-1]) == {1000}
    assert 0 < sizes[-1] <= 1000
    assert [shard["max_token"] for shard in manifest["splits"]["train"]["shards"]] == [256] * len(sizes)
    assert not list((tmp_path / "set").glob("*.tmp"))
    assert not (tmp_path / "set" / "progress.json").exists()


def test_containers_hold_the_same_stream(folder: Path, tmp_path: Path) -> None:
    llmc = Dataset(quietly("text", tmp_path / "llmc", source=folder))
    npy = Dataset(quietly("text", tmp_path / "npy", source=folder, format="npy", shard_tokens=1000))
    assert ids(npy.train) == ids(llmc.train)
    assert ids(npy.val) == ids(llmc.val)
    loaded = [np.load(path) for path in sorted((tmp_path / "npy").glob("text_train_*.npy"))]
    assert np.concatenate(loaded).tolist() == ids(llmc.train)

    nanogpt = Dataset(quietly("text", tmp_path / "nano", source=folder, format="nanogpt", shard_tokens=1000))
    stream = np.fromfile(tmp_path / "nano" / "train.bin", np.uint16).tolist()
    assert stream == ids(nanogpt.train)
    assert stream == [*ids(llmc.train)[1:], 256]  # appended instead of prepended
    (tmp_path / "nano" / "manifest.json").unlink()  # as nanoGPT leaves it
    assert ids(Dataset(tmp_path / "nano").val) == ids(nanogpt.val)


def test_large_vocabularies_take_32_bits() -> None:
    assert containers.token_dtype("llmc", 2**16) == np.uint16
    assert containers.token_dtype("llmc", 2**16 + 1) == np.uint32
    with pytest.raises(DataError, match="format npy holds 16-bit ids and the vocabulary has 65537: use --format llmc"):
        containers.token_dtype("npy", 2**16 + 1)


def test_the_largest_id_of_a_shard_is_recorded(tmp_path: Path) -> None:
    state: dict[str, Any] = {"shards": [], "tokens": 0, "documents": 0, "bytes": 0, "open_tokens": 0, "open_max": -1}
    draft = {"format": "llmc", "corpus": "text", "settings": {"shard_tokens": 5}}
    writer = ShardWriter(tmp_path, "train", np.dtype("<u2"), draft, state)
    for values in ([7, 9], [1], [2, 3, 4], [0]):
        writer.write(Piece("train", np.array(values, "<u2"), 1, 0))
    writer.close()
    writer.publish()
    assert [(shard["tokens"], shard["max_token"]) for shard in state["shards"]] == [(5, 9), (2, 4)]
    assert ids(Tokens([read_shard(tmp_path / f"train-00000{index}.bin") for index in (0, 1)])) == [7, 9, 1, 2, 3, 4, 0]


@pytest.mark.parametrize("tokenizer", ["gpt2", "byte", "char", "bpe-280"])
def test_the_number_of_workers_changes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 300)  # some 30 batches
    made = [
        digests(
            quietly(
                "text", tmp_path / str(workers), source=folder, shard_tokens=700, workers=workers, tokenizer=tokenizer
            )
        )
        for workers in (1, 2, 5)
    ]
    assert len(made[0]) > 4
    assert made[0] == made[1] == made[2]


def test_the_default_folder_is_where_a_recipe_looks(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    made = prepare("text", source=folder, tokenizer="byte", progress=False)
    assert made == Path(Data(corpus="text", tokenizer="byte").folder) == Path("data/text-byte")
    assert Dataset(made).vocab_size == 257
    by_path = prepare("docs", tokenizer="byte", progress=False)
    assert by_path == Path(Data(corpus="docs", tokenizer="byte").folder)
    assert Dataset(by_path).fingerprint() == Dataset(made).fingerprint()


# -- restarting


def test_a_stop_at_any_moment_is_made_good(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and it is processes that fail here, not disks
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr(pipeline, "RECORD_SECONDS", 0.0)
    whole = digests(quietly("text", tmp_path / "whole", source=folder, shard_tokens=900))
    for stop in range(1, 130, 5):
        out = tmp_path / f"stop{stop}"
        for number in (stop, 2 * stop):  # the rerun is stopped as well
            with killed_before(number, (os, "replace"), (os, "fsync")):
                quietly("text", out, source=folder, shard_tokens=900)
        quietly("text", out, source=folder, shard_tokens=900)
        assert digests(out) == whole
        assert not list(out.glob(".*.tmp"))


def test_a_rerun_does_not_tokenise_finished_shards_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 500)
    seen: list[str] = []
    tokenize = pipeline._tokenize
    stop_after: float = 60

    def watched(batch: list[base.Document], **settings: Any) -> Any:
        if len(seen) >= stop_after:
            raise Killed
        seen.extend(document.text for document in batch)
        return tokenize(batch, **settings)

    monkeypatch.setattr(pipeline, "_tokenize", watched)
    with pytest.raises(Killed):
        quietly("text", tmp_path / "set", source=folder, shard_tokens=1000)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("train-*.bin")}
    assert len(finished) > 1
    first = len(seen)
    stop_after = float("inf")
    quietly("text", tmp_path / "set", source=folder, shard_tokens=1000)
    again = len(seen) - first
    assert again < 100 - first + 30  # what follows the last finished shard, and no more
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    assert sorted(texts_of(Dataset(tmp_path / "set").train) + texts_of(Dataset(tmp_path / "set").val)) == sorted(
        documents(100)
    )


@pytest.mark.slow
def test_a_killed_process_goes_on(folder: Path, tmp_path: Path) -> None:
    whole = digests(quietly("text", tmp_path / "whole", source=folder, shard_tokens=500, tokenizer="gpt2"))
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom gptlab.data.prepare import pipeline\n"
        "pipeline.BATCH_CHARACTERS = 400\ntokenize = pipeline._tokenize\n"
        "def slowly(*args, **settings):\n    time.sleep(0.05)\n    return tokenize(*args, **settings)\n"
        "pipeline._tokenize = slowly\n"
        "pipeline.prepare('text', source=sys.argv[1], out=sys.argv[2], tokenizer='gpt2', shard_tokens=500, workers=2)\n"
    )
    out = tmp_path / "killed"
    kills = 0
    while not (out / "manifest.json").exists() or (out / "progress.json").exists():  # also after the manifest
        process = subprocess.Popen([sys.executable, "-c", script, str(folder), str(out)])
        before = len(list(out.glob("train-*.bin")))
        while process.poll() is None and len(list(out.glob("train-*.bin"))) < before + 2:
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        assert process.returncode in (0, -signal.SIGKILL)
    assert kills >= 2
    assert digests(out) == whole


def test_a_finished_folder_is_left_as_it_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quietly("text", tmp_path / "set", source=folder)
    monkeypatch.setattr(pipeline, "_prepare", None)
    quietly("text", tmp_path / "set", source=folder, progress=True, workers=3)
    assert "already prepared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"tokenizer": "char"}, r"tokenizer.name = byte \(now char\)"),
        ({"shard_tokens": 999}, r"shard_tokens = 100000000 \(now 999\)"),
        ({"format": "npy"}, r"format = llmc \(now npy\)"),
        ({"val_fraction": 0.2}, r"val_fraction = None \(now 0.2\)"),
        ({"max_documents": 50}, r"max_documents = None \(now 50\)"),
    ],
)
def test_other_settings_are_refused(folder: Path, tmp_path: Path, change: dict[str, Any], difference: str) -> None:
    before = digests(quietly("text", tmp_path / "set", source=folder))
    with pytest.raises(DataError, match=f"was made with .*{difference}.*: name another --out, or delete the folder"):
        quietly("text", tmp_path / "set", **{"source": folder, **change})
    assert digests(tmp_path / "set") == before


def test_changed_text_is_refused_and_a_moved_copy_is_not(folder: Path, tmp_path: Path) -> None:
    quietly("text", tmp_path / "set", source=folder)
    folder.rename(tmp_path / "moved")
    quietly("text", tmp_path / "set", source=tmp_path / "moved")
    (tmp_path / "moved" / "100.txt").write_text("one more", encoding="utf-8")
    with pytest.raises(DataError, match=r"source.files = 100 \(now 101\)"):
        quietly("text", tmp_path / "set", source=tmp_path / "moved")


def test_a_start_that_came_to_nothing_does_not_block_the_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"body": "text"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 1 has no field 'text', only body: name the field of the text"):
        quietly("text", tmp_path / "set", source=tmp_path / "bad.jsonl")
    quietly("text", tmp_path / "set", source=folder, tokenizer="char")
    assert Dataset(tmp_path / "set").tokenizer.name == "char"


def test_other_files_are_never_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train-000000.bin").write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match=r"holds other files \(train-000000.bin\): name another --out"):
        quietly("text", tmp_path / "set", source=folder)
    assert (tmp_path / "set" / "train-000000.bin").read_text(encoding="utf-8") == "mine"


def test_one_process_at_a_time(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with prepare_folder.lock(tmp_path / "set"), pytest.raises(DataError, match="is being prepared by another process"):
        quietly("text", tmp_path / "set", source=folder)


def test_a_full_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match="no space left for .*: make room and run the same again"):
            quietly("text", tmp_path / "set", source=folder)
    quietly("text", tmp_path / "set", source=folder)


def test_a_folder_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="file/set cannot be written: Not a directory"):
        quietly("text", tmp_path / "file" / "set", source=folder)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"format": "tfrecord"}, "no format 'tfrecord': use llmc, nanogpt, npy"),
        ({"shard_tokens": 2**31}, "shard_tokens = 2147483648: must be at least 1 and at most 2147483647"),
        ({"workers": 0}, "workers = 0: must be at least 1"),
        ({"val_fraction": 0.9}, "val_fraction = 0.9: must be at least 0 and at most 0.5"),
        ({"val_fraction": 0.1, "val_tokens": 5}, "both set"),
        ({"tokenizer": "gpt9"}, "no tokenizer 'gpt9'"),
        ({"source": "/nowhere"}, "/nowhere does not exist"),
    ],
)
def test_settings_are_checked(folder: Path, tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        quietly("text", tmp_path / "set", **{"source": folder, **settings})


# -- room and pace


def test_a_disk_too_small_is_refused_at_the_beginning(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 300)
    free = 0
    monkeypatch.setattr(prepare_folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, free))
    size = sum(len(text.encode()) for text in documents(100))  # 2 bytes a byte are needed
    free = int(2 * size / prepare_folder.ROOM_MARGIN / 1.6)
    with pytest.raises(DataError, match=r"set needs about 0.00 GB and 0.00 GB are free: make room, or .* --out"):
        quietly("text", tmp_path / "set", source=folder)
    assert not list((tmp_path / "set").glob("train*"))
    free = 2 * size
    dataset = Dataset(quietly("text", tmp_path / "set", source=folder, tokenizer="char"))  # nothing was in it yet
    assert dataset.tokenizer.name == "char"


def test_the_need_of_room_is_what_is_still_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        prepare_folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9 * 10**9, 0, 3 * 10**9)
    )
    prepare_folder.check_room(tmp_path, 10**9, None)  # not known
    prepare_folder.check_room(tmp_path, 10**9, 0.25)  # 3 GB more
    prepare_folder.check_room(tmp_path, 10**9, 1.0)
    with pytest.raises(DataError, match=r"needs about 9.00 GB and 3.00 GB are free"):
        prepare_folder.check_room(tmp_path, 10**9, 0.1)


def test_a_line_now_and_then_where_there_is_no_terminal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    quietly("text", tmp_path / "set", source=folder, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 3 and lines[0] == "set: reading"
    assert all(
        re.fullmatch(r"set: (reading|tokenising): +\d+%, .+ left(, 0.0M tokens, .+M tokens/s)?", line)
        for line in lines[1:]
    )
    assert lines[-1].startswith("set: tokenising: 100%, 0:00 left")
    quietly("text", tmp_path / "other", source=folder)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "json", "parquet"])
def test_the_share_that_was_read(tmp_path: Path, kind: str) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents(3000))
    (tmp_path / "docs").mkdir()
    for index in range(2):
        path = tmp_path / "docs" / f"{index}.{kind}"
        if kind == "parquet":
            parquet.write_table(pa.table({"text": documents(3000)}), path)
        elif kind == "json":
            path.write_text(json.dumps(documents(3000)), encoding="utf-8")
        elif kind == "txt":
            path.write_text(lines, encoding="utf-8")
        else:
            path.write_bytes(gzip.compress(lines.encode()) if kind == "jsonl.gz" else lines.encode())
    corpus = open_corpus("text", tmp_path / "docs")
    for _ in range(2):  # a vocabulary is learnt from a first reading
        shares = [corpus.reading.share or 0.0 for _ in corpus.documents()]
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
        assert shares[len(shares) // 2 - 1] == 0.5
        if kind != "txt":
            assert 0.2 < shares[len(shares) // 4] < 0.45  # gzip is read ahead


# -- parts


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """9 jsonl files of 40 documents each."""
    (tmp_path / "files").mkdir()
    for index in range(9):
        texts = documents(360)[40 * index : 40 * index + 40]
        (tmp_path / "files" / f"{index}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8"
        )
    return tmp_path / "files"


def in_parts(files: Path, out: Path, parts: int, **settings: Any) -> Dataset:
    for index in reversed(range(1, parts + 1)):  # in no particular order
        made = quietly("text", out, source=files, part=f"{index}/{parts}", **settings)
        assert made == out / f"part-{index:04d}-of-{parts:04d}"
    return Dataset(prepare("text", out=out, merge=True, progress=False))


@pytest.mark.parametrize("format", ["llmc", "npy"])
def test_parts_with_the_first_tokens_held_out_are_the_whole(files: Path, tmp_path: Path, format: str) -> None:
    whole = Dataset(quietly("text", tmp_path / "whole", source=files, val_tokens=2500))
    for parts in (1, 2, 9):
        merged = in_parts(files, tmp_path / f"{parts}", parts, val_tokens=2500, shard_tokens=700, format=format)
        assert ids(merged.val) == ids(whole.val)
        assert ids(merged.train) == ids(whole.train)
        for split in ("train", "val"):
            for key in ("tokens", "documents", "bytes"):
                assert merged.manifest["splits"][split][key] == whole.manifest["splits"][split][key]
        assert merged.manifest["settings"]["parts"] == parts
        merged.verify()
        assert sorted(path.name for path in (tmp_path / f"{parts}").glob("part*")) == []


def test_a_share_held_out_does_not_depend_on_the_number_of_parts(files: Path, tmp_path: Path) -> None:
    merged = [in_parts(files, tmp_path / f"{parts}", parts, val_fraction=0.1) for parts in (1, 2, 7)]
    held_out = texts_of(merged[0].val)
    assert 10 < len(held_out) < 70  # a tenth of 360
    for dataset in merged:
        assert texts_of(dataset.val) == held_out
        assert texts_of(dataset.train) == [text for text in documents(360) if text not in held_out]


def test_a_merge_that_was_stopped_goes_on(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = in_parts(files, tmp_path / "whole", 3, shard_tokens=900)
    for index in (1, 2, 3):
        quietly("text", tmp_path / "set", source=files, part=f"{index}/3", shard_tokens=900)
    with pytest.raises(DataError, match="set holds parts of a dataset: `gptlab prepare ... --merge` makes"):
        Dataset(tmp_path / "set")
    inodes = {path.stat().st_ino for path in (tmp_path / "set").glob("part-*/*.bin")}
    moves = len(inodes)
    for stop in (1, 3, moves - 1, 3, 1, 2):  # the last in removing the parts
        with killed_before(stop, (os, "replace"), (shutil, "rmtree")):
            prepare("text", out=tmp_path / "set", merge=True, progress=False)
    prepare("text", out=tmp_path / "set", merge=True, progress=False)
    assert digests(tmp_path / "set") == digests(tmp_path / "whole")
    assert {path.stat().st_ino for path in (tmp_path / "set").glob("*.bin")} == inodes  # moved, not copied
    assert Dataset(tmp_path / "set").fingerprint() == whole.fingerprint()
    (tmp_path / "set" / "part-0002-of-0003").mkdir()
    (tmp_path / "set" / "part-0002-of-0003" / "train-000000.bin").write_text("something else", encoding="utf-8")
    with pytest.raises(DataError, match="set holds a finished dataset beside the parts"):
        prepare("text", out=tmp_path / "set", merge=True)
    shutil.rmtree(tmp_path / "set" / "part-0002-of-0003")
    quietly("text", tmp_path / "set", source=files, part="2/3", shard_tokens=900)  # late: nothing to do
    with pytest.raises(DataError, match=r"parts = 3 \(now 4\)"):
        quietly("text", tmp_path / "set", source=files, part="2/4", shard_tokens=900)
    assert not list((tmp_path / "set").glob("part*"))


def test_parts_that_do_not_fit_are_refused(files: Path, tmp_path: Path) -> None:
    quietly("text", tmp_path / "a", source=files, part="1/3")
    quietly("text", tmp_path / "a", source=files, part="3/3", val_fraction=0.2)
    with pytest.raises(DataError, match="1 of 3 parts are not finished: prepare them with --part 2/3"):
        prepare("text", out=tmp_path / "a", merge=True)
    quietly("text", tmp_path / "a", source=files, part="2/3")
    with pytest.raises(DataError, match=r"part-0003-of-0003 was made with val_fraction = 0.2 \(in part-0001.* None\)"):
        prepare("text", out=tmp_path / "a", merge=True)
    quietly("text", tmp_path / "a", source=files, part="1/2")
    with pytest.raises(DataError, match=r"a contains parts of two different splits \(.../2 and .../3\): keep one set"):
        prepare("text", out=tmp_path / "a", merge=True)
    with pytest.raises(DataError, match="b has no parts"):
        prepare("text", out=tmp_path / "b", merge=True)
    quietly("text", tmp_path / "c", source=files)
    with pytest.raises(DataError, match=r"parts = None \(now 3\)"):
        quietly("text", tmp_path / "c", source=files, part="1/3")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train-000000.bin").write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match=r"d holds other files \(train-000000.bin\)"):
        quietly("text", tmp_path / "d", source=files, part="1/3")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"part": "0/3"}, "part 0/3: give I/N, a number from 1 to N"),
        ({"part": "4/3"}, "part 4/3: give I/N"),
        ({"part": "one"}, "part one: give I/N"),
        ({"part": "1/10"}, "has 9 files and a part is whole files: use at most 9 parts"),
        ({"part": "1/3", "format": "nanogpt"}, "format nanogpt has one file a split"),
        ({"part": "1/3", "tokenizer": "bpe-300"}, "tokenizer bpe-300 would be learnt again by each part"),
        ({"part": "1/3", "tokenizer": "char"}, "tokenizer char would be learnt again by each part"),
    ],
)
def test_settings_of_parts_are_checked(files: Path, tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        quietly("text", tmp_path / "set", **{"source": files, **settings})
    with pytest.raises(DataError, match="the corpus stdlib has no files to share out: prepare it without --part"):
        quietly("stdlib", tmp_path / "set", part="1/3")


def test_a_vocabulary_is_learnt_from_the_beginning(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = open_corpus("text", files, val_tokens=10)
    monkeypatch.setattr(pipeline, "VOCABULARY_CHARACTERS", 500)
    shown = progress.Progress("starting", wanted=False)
    texts = list(pipeline._vocabulary_texts("bpe-300", corpus, None, shown)())
    assert texts == documents(360)[: len(texts)]
    assert sum(map(len, texts[:-1])) < 500 <= sum(map(len, texts))
    assert shown.what == "learning 43 merges"
    assert len(list(pipeline._vocabulary_texts("char", corpus, None, shown)())) == 360


# -- splits


def test_openwebtext_is_split_as_nanogpt_splits_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = corpora.nanogpt_held_out(8_013_769)
    assert len(chosen) == 4007  # nanoGPT's 8,009,762 and 4,007 documents
    assert sum(chosen) == 15_941_513_342
    texts = iter([("", "" if index % 100 == 7 else f"{index}") for index in range(5000)])  # some are empty
    split = list(base.Corpus("x", {}, lambda: texts, held_out=lambda: frozenset({0, 7, 4000})).split())
    assert [document.text for document in split if document.split == "val"] == ["0", "4000"]
    assert len(split) == 4950
    assert open_corpus("openwebtext").held_out is not None
    assert open_corpus("openwebtext", val_fraction=0.01).held_out is None
    assert open_corpus("openwebtext", part=(1, 2)).held_out is None


@pytest.mark.slow
def test_nanogpts_split_is_that_of_datasets() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"index": list(range(30_000))})
    theirs = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)["test"]["index"]
    assert corpora.nanogpt_held_out(30_000) == frozenset(theirs)


def test_the_first_tokens_are_held_out_exactly(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 700)
    whole = ids(Dataset(quietly("text", tmp_path / "a", source=folder, val_fraction=0)).train)
    dataset = Dataset(quietly("text", tmp_path / "b", source=folder, val_tokens=1234, shard_tokens=1000))
    assert ids(dataset.val) == whole[:1234]
    assert ids(dataset.train) == whole[1234:]
    entries = dataset.manifest["splits"]
    assert entries["val"]["documents"] == whole[:1234].count(256)
    assert entries["val"]["bytes"] == 1234 - whole[:1234].count(256)
    assert sum(entry["documents"] for entry in entries.values()) == 100
    assert sum(entry["bytes"] for entry in entries.values()) == sum(len(text.encode()) for text in documents(100))
    with pytest.raises(DataError, match=r"all \d+ tokens of the corpus text fell into the validation split"):
        quietly("text", tmp_path / "c", source=folder, val_tokens=10**6)


def test_few_documents_give_one_to_validation(tmp_path: Path) -> None:
    for count in (2, 3, 19):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents(count))
        (tmp_path / f"{count}.jsonl").write_text(lines, encoding="utf-8")
        dataset = Dataset(quietly("text", tmp_path / f"set{count}", source=tmp_path / f"{count}.jsonl"))
        assert dataset.manifest["splits"]["val"]["documents"] == 1
        assert dataset.manifest["splits"]["train"]["documents"] == count - 1


def test_one_document_is_cut_by_position(tmp_path: Path) -> None:
    text = "".join(chr(ord("a") + index % 26) for index in range(1115))
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    dataset = Dataset(quietly("text", tmp_path / "set", source=tmp_path / "one.txt", tokenizer="char"))
    assert (len(dataset.train), len(dataset.val)) == (1003, 112)  # int(0.9 * 1115), as nanoGPT
    assert dataset.tokenizer.eot is None
    assert dataset.tokenizer.decode(ids(dataset.train) + ids(dataset.val)) == text
    quarter = Dataset(quietly("text", tmp_path / "q", source=tmp_path / "one.txt", val_fraction=0.25))
    assert len(texts_of(quarter.val)[0]) == 1115 - int(0.75 * 1115)


def test_max_documents(folder: Path, tmp_path: Path) -> None:
    dataset = Dataset(quietly("text", tmp_path / "set", source=folder, max_documents=30))
    assert sorted(texts_of(dataset.train) + texts_of(dataset.val)) == sorted(documents(100)[:30])


# -- corpora


def test_every_kind_of_local_file(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    root = tmp_path / "mixed"
    (root / "sub").mkdir(parents=True)
    lines = '{"text": "jsonl 1", "id": 1}\n\n{"text": "jsonl \\ud800"}\n{"text": ""}\n'
    (root / "a.jsonl").write_text(lines, encoding="utf-8")
    (root / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zipped"}\n'))
    (root / "c.json").write_text('[{"text": "json 1"}, "json 2"]', encoding="utf-8")
    (root / "d.md").write_bytes(b"\xef\xbb\xbfwith a mark\r\n")
    (root / "sub" / "e.txt").write_text("text", encoding="utf-8")
    (root / "sub" / "f.txt.gz").write_bytes(gzip.compress(b"text, zipped"))
    parquet.write_table(pa.table({"n": [1, 2, 3], "text": ["row 1", None, "row 3"]}), root / "g.parquet")
    (root / "ignored.csv").write_text("x", encoding="utf-8")
    (root / ".hidden.txt").write_text("x", encoding="utf-8")
    found = [text for _, text in open_corpus("text", root).documents() if text]
    assert found == [
        "jsonl 1",
        "jsonl \ufffd",
        "zipped",
        "json 1",
        "json 2",
        "with a mark\n",
        "row 1",
        "row 3",
        "text",
        "text, zipped",
    ]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"\xff\xfe", "a.txt is not UTF-8 text"),
        ("a.jsonl", b'{"text": 1}\n', "a.jsonl, line 1: field 'text' holds int, not text"),
        ("a.jsonl", b"{}\nnot json\n", "a.jsonl, line 1 has no field 'text': name the field of the text"),
        ("a.jsonl", b'{"text": "x"}\nnot json\n', "a.jsonl, line 2 is not JSON"),
        ("a.json", b'[{"text": "x"}\n{"text": "y"}]\n', "a.json is not JSON: Expecting ',' delimiter"),
        ("a.txt.gz", b"not gzip", "a.txt.gz cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], "a.jsonl.gz cannot be read"),
        ("a.parquet", b"PAR1 nothing", "a.parquet is not a readable parquet file"),
        ("a.txt", b"", "the corpus text has no documents: .*a.txt holds no text"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        quietly("text", tmp_path / "set", source=tmp_path / name)


def test_a_parquet_column_is_named(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"body": documents(30), "id": list(range(30))}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no field 'text', only body, id: name the field of the text with --text"):
        quietly("text", tmp_path / "set", source=tmp_path / "a.parquet")
    with pytest.raises(DataError, match="field 'id' holds int, not text"):
        quietly("text", tmp_path / "set", source=tmp_path / "a.parquet", text_field="id")
    quietly("text", tmp_path / "set", source=tmp_path / "a.parquet", text_field="body")


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no text: no file in it ends in .txt"):
        quietly("text", tmp_path / "set", source=tmp_path / "empty")
    with pytest.raises(DataError, match="is read from --from: name a file or folder"):
        quietly("text", tmp_path / "set")
    with pytest.raises(DataError, match="no corpus 'wikipedia': use stdlib, shakespeare, .* or the path of a file"):
        quietly("wikipedia", tmp_path / "set")


def test_stdlib(tmp_path: Path) -> None:
    found = list(open_corpus("stdlib").documents())
    names = [name for name, _ in found]
    assert names == [name for name, _ in open_corpus("stdlib").documents()]
    assert len(names) == len(set(names))
    assert {"os.py", "json/decoder.py", "pydoc_data/topics/with"} <= set(names)
    assert not [name for name in names if "/test" in name or "site-packages" in name]
    source = Path(os.__file__).read_text(encoding="utf-8")
    assert dict(found)["os.py"] == source
    assert 8e6 < sum(len(text) for _, text in found) < 20e6
    manifest = Dataset(quietly("stdlib", tmp_path / "set", max_documents=60)).manifest
    assert manifest["source"] == {"python": ".".join(map(str, sys.version_info[:3]))}


def test_named_documents_stay_on_their_side_when_others_come_and_go() -> None:
    def held_out(count: int) -> set[str]:
        named = [(f"module{index}.py", f"text {index}") for index in range(0, 2000, count)]
        split = list(base.Corpus("named", {}, lambda: iter(named)).split())
        assert [document.text for document in split] == [text for _, text in named]
        return {document.text for document in split if document.split == "val"}

    every, third = held_out(1), held_out(3)
    assert 60 < len(every) < 140  # 0.05 of 2000, give or take four standard deviations
    assert third == {text for text in every if int(text.split()[1]) % 3 == 0}


SONNET = b"From fairest creatures we desire increase,\nThat thereby beauty's rose might never die,\n"


@pytest.fixture
def shakespeare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A network that answers with whatever `content` is, or not at all."""
    network: dict[str, Any] = {"content": SONNET, "calls": 0}

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        network["calls"] += 1
        if network["content"] is None:
            raise urllib.error.URLError("no route")
        return io.BytesIO(network["content"])

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(SONNET).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield network


def test_shakespeare_is_downloaded_once_and_checked(shakespeare: dict[str, Any], tmp_path: Path) -> None:
    dataset = Dataset(quietly("shakespeare", tmp_path / "a", tokenizer="char"))
    assert dataset.tokenizer.decode(ids(dataset.train) + ids(dataset.val)) == SONNET.decode()
    assert dataset.manifest["source"]["sha256"] == hashlib.sha256(SONNET).hexdigest()
    assert dataset.manifest["source"]["url"].startswith("https://")
    assert shakespeare["calls"] == 1
    shakespeare["content"] = None
    quietly("shakespeare", tmp_path / "b")  # from the cache
    (tmp_path / "cache" / "gptlab" / "tinyshakespeare.txt").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"could not be downloaded from .* \(<urlopen error no route>\): .*--from FILE"):
        quietly("shakespeare", tmp_path / "c")
    shakespeare["content"] = b"something else"
    with pytest.raises(DataError, match=r"is not the file it was \(another sha256\): name a copy with --from FILE"):
        quietly("shakespeare", tmp_path / "c")


def test_shakespeare_from_a_file(shakespeare: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_bytes(b"To be, or not to be")
    manifest = Dataset(quietly("shakespeare", tmp_path / "a", source=tmp_path / "mine.txt", tokenizer="char")).manifest
    assert manifest["source"]["sha256"] == hashlib.sha256(b"To be, or not to be").hexdigest()
    assert shakespeare["calls"] == 0


@pytest.mark.slow
def test_hub_corpora_from_local_copies(tmp_path: Path) -> None:
    datasets, pa = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"id": list(range(100)), "text": documents(100)})
    repository = tmp_path / "repository"
    (repository / "sample" / "10BT").mkdir(parents=True)
    parquet.write_table(table.slice(0, 50), repository / "sample" / "10BT" / "000.parquet")
    parquet.write_table(table.slice(50), repository / "sample" / "10BT" / "001.parquet")
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n",
        encoding="utf-8",
    )
    (tmp_path / "plain").mkdir()
    parquet.write_table(table, tmp_path / "plain" / "train-00000.parquet")
    datasets.Dataset.from_dict({"text": documents(100)}).save_to_disk(str(tmp_path / "disk"))
    for name, source, settings in (
        ("fineweb-edu", repository, {}),
        ("fineweb-edu", tmp_path / "plain", {"val_tokens": 500}),
        ("openwebtext", tmp_path / "plain", {}),
        ("openwebtext", tmp_path / "disk", {}),
        ("openwebtext", tmp_path / "plain" / "train-00000.parquet", {}),
    ):
        dataset = Dataset(quietly(name, tmp_path / f"{name}-{source.stem}", source=source, **settings))
        if settings:
            assert len(dataset.val) == 500
            assert texts_of(dataset.val)[:3] == documents(3)
        else:
            assert sorted(texts_of(dataset.train) + texts_of(dataset.val)) == sorted(documents(100))


@pytest.mark.slow
def test_the_hub_is_streamed_whole_and_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    repository = tmp_path / "repository"  # stands in for the hub: the same call with another name
    (repository / "sample" / "10BT").mkdir(parents=True)
    table = pa.table({"id": list(range(120)), "text": documents(120)})
    for index in range(4):
        parquet.write_table(table.slice(30 * index, 30), repository / "sample" / "10BT" / f"{index:03d}_00000.parquet")
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n",
        encoding="utf-8",
    )
    monkeypatch.setitem(
        TEXT, "fineweb-edu", corpora.Hub(str(repository), "sample-10BT", 120, "sample/10BT", val_tokens=10**8).open
    )
    whole = Dataset(quietly("fineweb-edu", tmp_path / "whole", val_tokens=500))
    copy = Dataset(quietly("fineweb-edu", tmp_path / "copy", source=repository, val_tokens=500))
    for index in (1, 2, 3):
        quietly("fineweb-edu", tmp_path / "parts", val_tokens=500, part=f"{index}/3")
    merged = Dataset(prepare("text", out=tmp_path / "parts", merge=True, progress=False))
    for dataset in (whole, copy, merged):
        assert ids(dataset.val) == ids(whole.val)
        assert ids(dataset.train) == ids(whole.train)
    assert texts_of(whole.val)[:2] == documents(2)
    with pytest.raises(DataError, match="has 4 files and a part is whole files: use at most 4 parts"):
        quietly("fineweb-edu", tmp_path / "five", part="1/5")
    held_out = []
    for parts in (2, 4):
        for index in range(1, parts + 1):
            quietly("fineweb-edu", tmp_path / f"share{parts}", val_fraction=0.1, part=f"{index}/{parts}")
        held_out.append(
            texts_of(Dataset(prepare("text", out=tmp_path / f"share{parts}", merge=True, progress=False)).val)
        )
    assert held_out[0] == held_out[1]
    corpus = open_corpus("fineweb-edu")
    shares = [corpus.reading.share for _ in corpus.documents()]
    assert shares[59] == 0.5
    assert shares[-1] == 1.0


def test_importing_the_room_loads_no_library() -> None:
    """A process that trains must not wait for tokenizers and corpus readers, nor this room for torch."""
    code = (
        "import sys, gptlab.data.shards, gptlab.data.sampler, gptlab.data.tokenizers, gptlab.data.prepare\n"
        "print([name for name in ('torch', 'tiktoken', 'tokenizers', 'datasets', 'pyarrow', 'rich')"
        " if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_shard_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    containers.write_shard(tmp_path / "a.bin", np.arange(10))
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert read_shard(tmp_path / "a.bin").tokens == 10


def test_a_record_that_a_kill_left_beside_the_manifest_goes(folder: Path, tmp_path: Path) -> None:
    quietly("text", tmp_path / "set", source=folder)
    before = digests(tmp_path / "set")
    (tmp_path / "set/progress.json").write_text("{}", encoding="utf-8")
    quietly("text", tmp_path / "set", source=folder)
    assert digests(tmp_path / "set") == before
