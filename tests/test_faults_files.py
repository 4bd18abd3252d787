"""Files that are damaged, missing, in the way or a stranger's: one sentence, the right exit status, nothing lost."""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import hashlib
import http.server
import io
import json
import lzma
import math
import os
import random
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import text_of, tiny_recipe
from readers import STUDY

from gptlab import files, rundir, train
from gptlab.cli import main
from gptlab.config import Recipe, build_recipe, load_study
from gptlab.data import download, verified
from gptlab.data.corpora.base import Reading
from gptlab.data.corpora.files import read_rows
from gptlab.data.labeled import LabeledDataset
from gptlab.data.prepare import prepare
from gptlab.data.shards import Dataset
from gptlab.errors import ConfigError, DataError, RunError
from gptlab.rundir import RunDir
from gptlab.study.table import read_study, study_table

NOT_ROOT = pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")


def command(*words: object) -> tuple[int, str]:
    """Exit status and stderr of a command line. Everything but an exit goes on, which would be a traceback."""
    heard = io.StringIO()
    with contextlib.redirect_stderr(heard), pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return int(end.value.code or 0), heard.getvalue()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset that `prepare` made, with sha256s."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "text.txt").write_text(text_of(4000, 1), encoding="utf-8")
    return prepare(str(folder / "text.txt"), out=folder / "set", tokenizer="byte", val_fraction=0.2)


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "data"))


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labeled")
    rows = [{"text": text_of(12, n), "label": n % 3} for n in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return prepare(str(folder / "rows.jsonl"), out=folder / "set", tokenizer="byte", label_field="label")


def byte_recipe(data: Path, **changes: object) -> Recipe:
    return tiny_recipe(data, **{"data__tokenizer": "byte", "train__max_steps": 4, **changes})


def put(file: Path, at: int, value: bytes) -> None:
    with open(file, "rb+") as opened:
        opened.seek(at)
        opened.write(value)


# -- data


def test_a_flipped_bit_in_a_shard_is_found_before_the_first_step(data: Path, tmp_path: Path) -> None:
    shard = data / "train-000000.bin"
    put(shard, 1500, bytes([shard.read_bytes()[1500] ^ 1]))
    with pytest.raises(DataError, match=r"train-000000.bin is damaged: its sha256 is not the manifest's"):
        train(byte_recipe(data), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_what_was_verified_is_not_read_again_until_it_changes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "REMEMBERED_BYTES", 1)
    hashed = verified.file_sha256
    monkeypatch.setattr(verified, "file_sha256", lambda path, *told: read.append(path.name) or hashed(path, *told))
    Dataset(data).verify_new()
    assert sorted(read) == ["tokenizer.json", "train-000000.bin", "val-000000.bin"]
    read.clear()
    Dataset(data).verify_new()
    assert read == []
    Dataset(data).verify()  # `gptlab verify` believes no record
    assert len(read) == 3
    read.clear()
    put(data / "val-000000.bin", 1400, b"\1")
    os.utime(data / "val-000000.bin", ns=(1, 1))
    with pytest.raises(DataError, match=r"val-000000.bin is damaged"):
        Dataset(data).verify_new()
    assert read == ["val-000000.bin"]
    for record in (tmp_path / "cache" / "gptlab").iterdir():
        record.write_text("[]", encoding="utf-8")  # a damaged record is none
    with pytest.raises(DataError, match=r"val-000000.bin is damaged"):
        Dataset(data).verify_new()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # a cache that cannot be written
    put(data / "val-000000.bin", 1400, (data / "val-000000.bin").read_bytes()[1400:1401])
    with pytest.raises(DataError, match=r"val-000000.bin is damaged"):
        Dataset(data).verify_new()


def test_an_id_outside_the_vocabulary_is_named_when_it_is_read(data: Path) -> None:
    put(data / "train-000000.bin", 1024 + 2 * 40, b"\xff\xff")
    dataset = Dataset(data)
    dataset.check(257)  # the manifest's record of the largest id
    dataset.train.gather(np.array([0]), 40)
    with pytest.raises(DataError, match=r"train-000000.bin holds token id 65535, and the vocabulary ends at 256"):
        dataset.train.gather(np.array([100, 10]), 40)


def test_a_shard_that_is_cut_off_under_way_ends_the_run_with_a_sentence(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptlab.training.trainer import Trainer

    seen = Trainer.seed_dropout

    def cut(self: Trainer, step: int) -> None:
        if step == 2:
            os.truncate(data / "train-000000.bin", 1100)
        seen(self, step)

    monkeypatch.setattr(Trainer, "seed_dropout", cut)
    with pytest.raises(DataError, match=r"train-000000.bin was truncated while it was in use"):
        train(byte_recipe(data), tmp_path / "run", quiet=True)
    result = RunDir(tmp_path / "run").read_json("result.json")
    assert (result["status"], result["steps"]) == ("failed", 2)
    assert "train-000000.bin was truncated" in result["reason"]


@pytest.mark.parametrize(
    ("name", "at", "value", "says"),
    [
        ("train.tokens.npy", 128 + 2, b"\xff\xff", "holds token id 65535"),
        ("train.labels.npy", 128, b"\x09\0\0\0", "holds label 9"),
        ("train.labels.npy", 128, b"\xff\xff\xff\xff", "holds label -1"),
        ("train.offsets.npy", 128 + 8, b"\xff" * 8, "train.offsets.npy is damaged"),
        ("train.label_offsets.npy", 128 + 8, b"\0" * 8, "train.label_offsets.npy is damaged"),
    ],
)
def test_a_labelled_array_is_bounded_where_it_is_read(
    labeled: Path, tmp_path: Path, name: str, at: int, value: bytes, says: str
) -> None:
    data = shutil.copytree(labeled, tmp_path / "data")
    put(data / name, at, value)
    with pytest.raises(DataError, match=says):
        split = LabeledDataset(data).splits["train"]
        split.batch(np.arange(len(split)), 64)
        split.targets(np.arange(len(split)), 3)
    with pytest.raises(DataError):
        LabeledDataset(data).verify_new()


def test_a_labelled_file_that_is_cut_off_under_way(labeled: Path, tmp_path: Path) -> None:
    split = LabeledDataset(shutil.copytree(labeled, tmp_path / "data")).splits["train"]
    os.truncate(tmp_path / "data" / "train.tokens.npy", 200)
    with pytest.raises(DataError, match="truncated while it was in use"):
        split.batch(np.arange(len(split)), 64)


def test_verify_reads_a_dataset_a_run_and_a_study(
    prepared: Path, data: Path, labeled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("verify", prepared)[0] == command("verify", labeled)[0] == 0
    assert capsys.readouterr().out == f"{prepared}: as written\n{labeled}: as written\n"
    put(data / "val-000000.bin", 1400, b"\1")
    assert command("verify", data)[0] == 1
    assert re.search(r"val-000000.bin is damaged: its sha256", capsys.readouterr().out)

    study = tmp_path / "two"
    study.mkdir()
    (study / "study.toml").write_text(STUDY, encoding="utf-8")
    run = RunDir(study / "a_seed0")
    train(byte_recipe(prepared), run.path, quiet=True)
    assert command("verify", run.path)[0] == 0
    assert "step-00000004: as written" in capsys.readouterr().out
    (study / "a_seed0.json").write_text("{}", encoding="utf-8")
    assert command("verify", study)[0] == 0
    wanted = [f"{study / 'study.toml'}: as written", f"{study / 'a_seed0'}, 7 files and checkpoints: as written"]
    assert capsys.readouterr().out.splitlines() == wanted
    put(run.checkpoints / "step-00000004" / "model.safetensors", 900, b"\1\2\3")
    with open(run.metrics_file, "a", encoding="utf-8") as file:
        file.write("{half a l\n")
    (study / "b_seed0.json").write_text("[]", encoding="utf-8")
    assert command("verify", study)[0] == 1
    says = capsys.readouterr().out.splitlines()
    damages = ("1 lines are damaged", "step-00000004 is damaged", "b_seed0.json is damaged")
    assert len(says) == 4 and all(damage in line for damage, line in zip(damages, says[1:], strict=True))
    assert command("verify", tmp_path / "nowhere")[0] == command("verify", tmp_path)[0] == 2


# -- one damaged run


@pytest.mark.parametrize("file", ["result.json", "environment.json", "recipe.toml"])
def test_a_damaged_file_takes_its_run_out_of_the_status_not_the_study(tmp_path: Path, file: str) -> None:
    (tmp_path / "study.toml").write_text(STUDY, encoding="utf-8")
    study = load_study(tmp_path / "study.toml")
    for arm in "ab":
        run = RunDir(tmp_path / f"{arm}_seed0")
        run.write_recipe(study.build(arm, 0))
        run.write_json("result.json", {"status": "completed", "steps": 2, "final_val_loss": 3.5})
        run.write_json("environment.json", {"data": {"train_tokens": 9}})
    for content in (b"", b"[]", b"null", b'{"status": 3, "data": []}', b"\xff", b'{"status": "fine", "data": null}'):
        (tmp_path / "a_seed0" / file).write_bytes(content)
        states = {state.arm: state for state in read_study(tmp_path)}
        assert states["b"].status == "completed"
        readable = file == "recipe.toml" and not content  # an empty recipe is all defaults
        assert readable or (states["a"].status == "damaged" and file in states["a"].reason)
        study_table(list(states.values()))


# -- what the file system says


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    train(byte_recipe(prepared, train__max_steps=1), tmp_path / "run", quiet=True)
    return tmp_path / "run"


def test_every_verb_says_what_is_in_its_way(run: Path, tmp_path: Path, prepared: Path) -> None:
    """A file where a folder is wanted, and a name that is too long."""
    (tmp_path / "study.toml").write_text(STUDY, encoding="utf-8")
    (tmp_path / "file").touch()
    recipe = run / "recipe.toml"
    for way in (tmp_path / "file" / "x", tmp_path / ("x" * 300)):
        calls: list[tuple[object, ...]] = [
            ("train", recipe, "--out", way),
            ("train", way),
            ("eval", run, "--out", way / "scores.json"),
            ("eval", way),
            ("sample", way),
            ("plot", run, "--out", way),
            ("plot", way),
            ("runs", way),
            ("watch", way),
            ("compare", run, way),
            ("compare", run, run, "--out", way),
            ("export", run, "--to", "hf", way),
            ("import", "hf", way, "--out", tmp_path / "i"),
            ("import", "nanogpt", way, "--out", tmp_path / "i"),
            ("prepare", way),
            ("prepare", tmp_path / "study.toml", "--tokenizer", "byte", "--out", way),
            ("plan", recipe, "--gpu", "h100", "--json", way / "x"),
            ("study", "run", tmp_path / "study.toml", "--out", way),
            ("study", "sweep", recipe, "optim.lr=1e-3,1e-2", "--out", way),
            ("study", "status", way),
            ("study", "report", way),
            ("init", "--data", way, "--minutes", "1", "--out", tmp_path / "new.toml"),
            ("init", "--data", "stdlib", "--minutes", "1", "--out", way / "new.toml"),
            ("launch", recipe, "--on", "slurm", "--print", "--profile", way),
            ("launch", "--status", way),
            ("stop", way),
            ("verify", way),
            ("train", recipe, "--data.path", way, "--out", tmp_path / "o"),
            ("train", recipe, "--train.init-from", way, "--out", tmp_path / "o"),
        ]
        for words in calls:
            status, says = command(*words)
            assert status in (1, 2), words
            assert says.startswith("gptlab: ") and says.count("\n") == 1, (words, says)


@NOT_ROOT
def test_no_permission_is_a_sentence(run: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    for words in (
        ("train", run / "recipe.toml", "--out", tmp_path / "closed" / "run"),
        ("plot", run, "--out", tmp_path / "closed" / "plots"),
        ("export", run, "--to", "hf", tmp_path / "closed" / "hf"),
    ):
        status, says = command(*words)
        assert status == 2 and "Permission denied" in says and says.count("\n") == 1


def test_a_result_that_cannot_be_written_is_said(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = RunDir.write_json

    def full(self: RunDir, name: str, value: dict[str, Any]) -> None:
        if name == "result.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path / name))
        write(self, name, value)

    monkeypatch.setattr(RunDir, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        train(byte_recipe(prepared), tmp_path / "run")
    says = capsys.readouterr().err
    assert re.search(r'result.json cannot be written \(No space left.*\); it would hold {"status": "completed"', says)
    (tmp_path / "r.toml").write_text(byte_recipe(prepared).to_toml(), encoding="utf-8")
    status, says = command("train", tmp_path / "r.toml", "--out", tmp_path / "other")
    assert (
        status == 1
        and says.splitlines()[-1] == f"gptlab: {tmp_path / 'other' / 'result.json'}: No space left on device"
    )
    monkeypatch.undo()
    assert train(byte_recipe(prepared), tmp_path / "run", quiet=True).status == "completed"  # there is room again


def test_the_steps_of_a_failed_run_are_its_steps(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptlab.training.trainer import Trainer

    def fail(self: Trainer, step: int) -> None:
        if step == 3:
            raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(Trainer, "inject_faults", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        train(byte_recipe(prepared), tmp_path / "run", quiet=True)
    assert RunDir(tmp_path / "run").read_json("result.json")["steps"] == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_output_to_a_full_disk_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        status, says = command("recipes")
        assert (status, says) == (1, "gptlab: No space left on device\n")
        with contextlib.suppress(OSError):
            full.close()


# -- strangers


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/../../b", "a\x1b[31m", "..", "a\\b"])
def test_a_name_does_not_lead_outside(name: str) -> None:
    with pytest.raises(ConfigError, match="name = "):
        build_recipe({"name": name, "train": {"max_steps": 1}})
    build_recipe({"name": "study/arm b+c", "train": {"max_steps": 1}})


def test_twenty_thousand_unknown_settings_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("".join(f"k{n} = 1\n" for n in range(20_000)), encoding="utf-8")
    began = time.process_time()
    status, says = command("train", tmp_path / "r.toml")
    assert status == 2 and "and 19,970 more" in says
    assert time.process_time() - began < 3
    status, says = command("train", tmp_path / "r.toml", "--train.threads", "x" * 5000)
    assert status == 2 and len(says) < 9000


def test_escapes_of_a_stranger_are_shown_and_not_sent(tmp_path: Path) -> None:
    status, says = command("train", "smoke-lm", "--train.threads", "\x1b[31mred\x07")
    assert status == 2 and "\x1b" not in says and r"\x1b[31mred\x07" in says
    (tmp_path / "study.toml").write_text(STUDY, encoding="utf-8")
    summary = {"study": "two", "arm": "a", "seed": 0, "status": "failed", "reason": "\x1b]0;title\x07"}
    (tmp_path / "a_seed0.json").write_text(json.dumps(summary), encoding="utf-8")
    from rich.console import Console

    with (out := Console(file=io.StringIO(), force_terminal=True, color_system=None)).capture() as shown:
        out.print(study_table(read_study(tmp_path)))
    assert "\x1b]0;" not in shown.get() and r"\x1b]0;title" in shown.get()


def test_a_small_file_that_unpacks_to_gigabytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LEAST_UNPACKED", 2**20)
    packers = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    with contextlib.suppress(ImportError):
        import zstandard

        packers["zst"] = zstandard.ZstdCompressor().compress
    for packing, pack in packers.items():
        packed = pack(b" " * 2**22)
        for name in ("a.txt", "a.json", "a.jsonl", "a.csv"):
            (tmp_path / f"{name}.{packing}").write_bytes(packed)
            with pytest.raises(DataError, match=rf"{name}.{packing} cannot be read: .* bytes"):
                list(read_rows([tmp_path / f"{name}.{packing}"], Reading()))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"some words " * 1000))
    [row] = read_rows([tmp_path / "b.txt.gz"], Reading())
    assert len(row.content) == 11000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "result.json")
    with pytest.raises(RunError, match=r"result.json cannot be read: it is not a file"):
        RunDir(tmp_path).read_json("result.json")


# -- downloads


@contextlib.contextmanager
def server(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with contextlib.suppress(OSError):
                answer(self)
            self.close_connection = True

        def log_message(self, *words: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_port}/file"
        finally:
            listening.shutdown()
            thread.join()


def raw(text: bytes) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    return lambda request: request.wfile.write(text) and None


def endless(request: http.server.BaseHTTPRequestHandler) -> None:
    request.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        request.wfile.write(b" " * 65536)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"), "ends 96 bytes too early"),
        (raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"), "could not be downloaded"),
        (raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab\r\n"), "could not be downloaded"),
        (raw(b"what\r\n\r\n"), "could not be downloaded"),
        (raw(b""), "could not be downloaded"),
        (raw(b"HTTP/1.1 503 Busy\r\n\r\n"), "could not be downloaded"),
        (raw(b"HTTP/1.1 200 OK\r\n\r\nsomething else"), "another sha256"),
        (endless, "does not end after"),
    ],
)
def test_a_download_that_fails_is_a_sentence_and_leaves_nothing(
    answer: Callable[[http.server.BaseHTTPRequestHandler], None],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "MOST_BYTES", 2**20, raising=False)
    with server(answer) as url, pytest.raises(DataError, match=says):
        download.fetch(url, "0" * 64, "file", "The file", "--from", DataError)
    assert not list(tmp_path.rglob("*.*"))
    content = b"right"
    with server(raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nright")) as url:
        file = download.fetch(url, hashlib.sha256(content).hexdigest(), "file", "The file", "--from", DataError)
    assert file.read_bytes() == content


# -- metrics


def metrics(folder: Path, lines: list[str]) -> RunDir:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return RunDir(folder)


@pytest.mark.parametrize(
    "text",
    [
        '{"step": 1, "loss": 2.5}\n{"step": 2, "val_loss": NaN}\n',
        '{"step": 1, "loss": 2.5}\n{"step": 2, "lo',
        '{"step": 1},{"step": 2}\n{"step": 3}\n',
        '{"step": 1},{"step": 2}\n{"step": 3\n"loss": 4}\n',
        '{"step": 1, "x": [{}\n{}]}\n{"step": 2},{"step": 3}\n',
        '{"step": 1}\n\n{"step": 2}\n',
        '{"step": true}\n{"step": -1}\n{"step": 9223372036854775808}\n{"step": 3}\n',
        '{"step": 1, "name": "x"}\n{"step": 2, "sub": {}}\n{"step": 3, "no": null}\n[]\n',
        '{"step": 1}\r\n{"step": 2}\n',
        "\ufeff" + '{"step": 1}\n{"step": 2}\n',
        "",
    ],
)
def test_lines_that_are_parsed_together_are_those_that_are_parsed_alone(tmp_path: Path, text: str) -> None:
    run = RunDir(tmp_path)
    run.metrics_file.write_text(text, encoding="utf-8", newline="")
    together, damaged = run.read_metrics(), run.damaged_lines
    run.damaged_lines = 0
    assert repr(together) == repr(list(run._metric_lines(1))) and damaged == run.damaged_lines


def test_damaged_lines_are_counted(tmp_path: Path) -> None:
    whole = [json.dumps({"step": n, "loss": 5 - n / 10}) for n in range(10)]
    damaged = [
        "{half",
        '{"step": "x"}',
        "[" * 100_000,
        "null",
        '{"step": 1e3}',
        '{"loss": 1}',
        '{"step": 3, "loss": "x"}',
    ]
    run = metrics(tmp_path / "run", [*whole[:5], *damaged, "", *whole[5:]])
    assert len(run.read_metrics()) == 10
    assert run.damaged_lines == len(damaged)
    assert [line["step"] for line in run.read_metrics()] == list(range(10))


def test_a_resume_says_what_it_lost(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = byte_recipe(prepared)
    train(recipe, tmp_path, quiet=True)
    whole = RunDir(tmp_path).read_metrics()
    lines = RunDir(tmp_path).metrics_file.read_bytes().splitlines(keepends=True)
    RunDir(tmp_path).metrics_file.write_bytes(b"".join(lines[:3]) + b"\0\0\0\n" + b"".join(lines[3:]) + b'{"step": 5')
    train(recipe.replace({"train.max_steps": 6}), tmp_path)
    assert re.search(r"metrics.jsonl: 1 damaged line removed", capsys.readouterr().err)
    run = RunDir(tmp_path)
    assert run.read_metrics()[: len(whole) - 1] == whole[:-1] and run.damaged_lines == 0
    assert {line["step"] for line in run.read_metrics()} == set(range(7))


def test_a_long_run_is_thinned_with_its_spikes_and_ends(tmp_path: Path) -> None:
    lines = [{"step": n, "loss": 3.0 if n != 777 else 30.0, "lr": 1e-3} for n in range(2000)]
    lines[1999]["loss"] = None  # type: ignore[typeddict-item]
    lines.insert(500, {"step": 500, "val_loss": 2.5})
    run = metrics(tmp_path / "run", [json.dumps(line) for line in lines])
    few = run.read_metrics(most=100)
    assert 95 <= len(few) <= 105
    assert {0, 777, 1999} <= {line["step"] for line in few}
    assert {"step": 500, "val_loss": 2.5} in few
    assert run.last_line("val_loss") == {"step": 500, "val_loss": 2.5}
    assert run.last_line("loss")["step"] == 1999  # type: ignore[index]
    assert run.last_line("nothing") is None
    assert run.cut_metrics(1000) == (1002, 0)
    assert [line["step"] for line in run.read_metrics() if "loss" in line] == list(range(1001))


def thinned(lines: list[str], every: int) -> list[dict[str, Any]]:
    """What of whole lines is kept: evaluations, each `every`-th line of training, the spikes between, the last."""
    kept, seen, level, spike = [], 0, -1.0, None
    for line in map(json.loads, lines):
        if "loss" not in line:
            kept.append(line)
            continue
        loss = math.inf if line["loss"] is None else line["loss"]
        if seen % every == 0:
            kept += [spike] * bool(spike)
            kept.append(line)
            level, spike = loss, None
        elif loss > (max(1.5 * level, -1.0) if spike is None else math.inf if spike["loss"] is None else spike["loss"]):
            spike = line
        seen += 1
    kept += [spike] * bool(spike)
    last = [line for line in map(json.loads, lines) if "loss" in line][-1:]
    return kept + last * (seen % every != 1)


@pytest.mark.parametrize("block", [200, 3000, 2**20])
def test_what_is_kept_of_a_long_run_does_not_depend_on_how_it_is_read(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(block)
    losses = [draw.choice([3.0, 3.5, 9.0, 1e3, draw.random(), None]) for _ in range(3000)]
    lines = [{"step": n, "loss": loss, "lr": 1e-3} for n, loss in enumerate(losses)]
    for n in range(0, 3000, 70):
        lines.insert(n, {"step": n, "val_loss": 2.5})
    text = [json.dumps(line) for line in lines]
    run = metrics(tmp_path / "run", text)
    monkeypatch.setattr(rundir, "MOST_LINE_BYTES", block)
    for most in (100, 400):
        expected = thinned(text, -(-len(text) // most))
        assert run.read_metrics(most) == expected and run.damaged_lines == 0
    nothing = [line.replace('"loss": null', '"loss": NaN') for line in text]
    numbers = thinned([line.replace('"loss": null', '"loss": -1e300') for line in text], 8)
    found = metrics(tmp_path / "nan", nothing).read_metrics(-(-len(text) // 8))
    told = [(line["step"], line.get("loss")) for line in numbers]
    assert [
        (line["step"], -1e300 if line.get("loss") != line.get("loss") else line.get("loss")) for line in found
    ] == told
    damaged = metrics(tmp_path / "damaged", [line[: -3 * (i % 5 == 4)] or line for i, line in enumerate(text)])
    damaged.read_metrics(100)
    assert damaged.damaged_lines == len(text) // 5


@pytest.mark.slow
def test_two_million_lines_plot_and_resume_in_bounded_memory(tmp_path: Path) -> None:
    import resource

    run = RunDir(tmp_path)
    byte = {"tokens": 524288, "lr": 0.00034567, "grad_norm": 0.8912345678, "tokens_per_second": 12345.678901, "x": 0.31}
    with open(run.metrics_file, "w", encoding="utf-8") as file:
        for n in range(2_000_000):
            file.write(json.dumps({"step": n, "loss": 3 + n % 7 / 10, **byte}) + "\n")
    from gptlab.report.plots import draw

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert draw([run], run.plots)
    assert time.process_time() - began < 30  # 5 s where nothing else runs
    run.cut_metrics(25)
    assert len(run.read_metrics()) == 26
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB
