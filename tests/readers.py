"""Every reader of gptlab with files that it reads, for tests that damage the files."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import pickle
import random
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptlab import kconfig
from gptlab.config import Model, load_comparison, load_recipe, load_study
from gptlab.data.containers import read_shard, write_shard
from gptlab.data.corpora import open_corpus
from gptlab.data.corpora.base import Reading
from gptlab.data.corpora.files import read_rows, text_of
from gptlab.data.labeled import LabeledDataset
from gptlab.data.prepare import prepare
from gptlab.data.prepare.folder import READER, read_record
from gptlab.data.shards import Dataset
from gptlab.data.tokenizer_files import open_tokenizer
from gptlab.data.tokenizers import load_tokenizer, make_tokenizer
from gptlab.errors import UserError
from gptlab.evals.hellaswag import load_llmc, load_rows
from gptlab.evals.perplexity import load_lambada, load_wikitext
from gptlab.interop.hf import export_hf, import_hf
from gptlab.interop.hf_encoder import read_encoder
from gptlab.interop.nanogpt import import_nanogpt
from gptlab.interop.source import source_tokenizer
from gptlab.interop.sparse24 import load_sparse24
from gptlab.model.gpt import build_model
from gptlab.report.listing import list_runs, runs_table
from gptlab.report.run_page import Follower
from gptlab.rundir import RunDir, new_plan, open_study, read_plan
from gptlab.study.launch.record import Launch, LaunchPart
from gptlab.study.launch.resources import Resources, read_resources
from gptlab.study.table import read_study, study_table

STUDY = """
name = "two"
seeds = [0]
baseline = "a"
[recipe.train]
max_steps = 2
[arms.a]
[arms.b]
optim.lr = 1e-4
[[questions]]
id = "Q1"
claim = "b is better"
contrast = ["b", "a"]
confirmed_if = "better"
"""
RESULT = {"status": "completed", "steps": 2, "tokens": 64, "final_val_loss": 3.5, "wall_seconds": 1.0, "scores": 0.5}
ENVIRONMENT = {"gptlab": "1", "threads": 1, "data": {"train_tokens": 640, "fingerprint": "ab", "path": ["x"]}}
LINES = [{"step": 0, "val_loss": 4.0}, *({"step": n, "loss": 4 - n / 100, "tokens_per_second": 9.5} for n in range(9))]


@dataclass
class Reader:
    """A function that reads `file`, and perhaps others beside it."""

    name: str
    file: Path
    read: Callable[[], object]

    def survives(self, content: bytes | None) -> bool:
        """Read the file with another content (None: without it), and restore it.

        Returns:
            Whether it was read; False where it was refused in a sentence. Every other exception goes on.
        """
        good = self.file.read_bytes()
        try:
            if content is None:
                self.file.unlink()
            else:
                self.file.write_bytes(content)
            try:
                self.read()
            except UserError as error:
                assert str(error) and len(str(error)) < 9000, f"{self.name}: {error}"
                return False
            except Exception as error:
                error.add_note(f"{self.name}, {self.file.name} of {content!r:.300}")
                raise
            return True
        finally:
            self.file.write_bytes(good)


def make_readers(root: Path) -> list[Reader]:
    """Write a whole file for every reader below `root`."""
    found: list[Reader] = []

    def add(name: str, file: Path, read: Callable[[], object]) -> None:
        found.append(Reader(name, file, read))

    def folder(name: str) -> Path:
        (root / name).mkdir()
        return root / name

    def write(file: Path, content: Any) -> Path:
        text = content if isinstance(content, str) else json.dumps(content)
        file.write_text(text, encoding="utf-8")
        return file

    # a run, and a study with it
    study = folder("two")
    write(study / "study.toml", STUDY)
    write(study / "plan.json", new_plan(load_study(study / "study.toml"), late=False))
    run = RunDir(study / "a_seed0")
    run.write_recipe(load_study(study / "study.toml").build("a", 0))
    run.write_json("result.json", RESULT)
    run.write_json("environment.json", ENVIRONMENT)
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    write(study / "b_seed0.json", {"study": "two", "arm": "b", "group": "core", "seed": 0, **RESULT})
    launch = Launch(study, "local", "two", "gptlab", [LaunchPart("study", [], Resources(), [("a", 0)], job="1")])
    launch.write()

    def whole_study() -> object:
        return study_table(read_study(study)), read_plan(study, open_study(study)), run.read_metrics(2)

    def whole_run() -> object:
        return run.read_recipe(), run.read_json("result.json"), run.read_json("environment.json")

    def listed() -> object:
        """What lists runs and shows them on a page, never refuses one."""
        follower = Follower(run.path, "a")
        follower.update()
        return runs_table(list_runs([run.path]), 80), json.dumps(follower.payload(), allow_nan=False)

    for file in ("study.toml", "plan.json", "b_seed0.json"):
        add("study", study / file, whole_study)
    for file in ("recipe.toml", "result.json", "environment.json"):
        add("run", run.path / file, whole_run)
        add("study of the run", run.path / file, whole_study)
        add("list of runs", run.path / file, listed)
    add("metrics", run.metrics_file, whole_study)
    add("list of runs", run.metrics_file, listed)
    add("launch", study / "launch.json", lambda: (found := Launch.read(study)) and list(found.tasks()))

    # files that people write
    text = folder("texts")
    add("recipe", write(text / "r.toml", load_recipe("smoke-lm").to_toml()), lambda: load_recipe(text / "r.toml"))
    add("profile", write(text / "p.toml", 'time = "1:00:00"\ngpus = 1\n'), lambda: read_resources(text / "p.toml", {}))
    two = 'compare = ["a", "b"]\n[[questions]]\nid = "H1"\nclaim = "c"\ncontrast = ["x", "y"]\nconfirmed_if = '
    both = write(text / "c.toml", two + '"better in a, not better in b"\n')
    add("comparison", both, lambda: load_comparison(both))
    config = write(text / "config", kconfig.start("smoke-lm").to_text())
    add("kconfig", config, lambda: kconfig.read(config))

    # corpora and evaluation data
    def rows(file: Path) -> list[str]:
        return [text_of(row.content, "text", row.where) for row in read_rows([file], Reading())]

    texts = [{"text": f"words {n} and \u00e9"} for n in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in texts)
    write(text / "a.txt", "words\nand more\n")
    write(text / "a.json", texts)
    write(text / "a.jsonl", lines)
    for name, content in (("b.txt.gz", "words\n" * 99), ("b.json.gz", json.dumps(texts)), ("b.jsonl.gz", lines)):
        (text / name).write_bytes(gzip.compress(content.encode()))
    for name, pack in (("c.jsonl.bz2", bz2.compress), ("c.jsonl.xz", lzma.compress)):
        (text / name).write_bytes(pack(lines.encode()))
    write(text / "a.csv", 'n,text\n1,"words, and\nmore"\n2,x\n')
    write(text / "a.tsv", "n\ttext\n1\twords\n")
    write(text / "unknown", lines)
    kinds = ["a.txt", "a.json", "a.jsonl", "b.txt.gz", "b.json.gz", "b.jsonl.gz"]
    kinds += ["c.jsonl.bz2", "c.jsonl.xz", "a.csv", "a.tsv", "unknown"]
    with contextlib.suppress(ImportError):
        import zstandard

        (text / "d.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
        kinds.append("d.jsonl.zst")
    with contextlib.suppress(ImportError):
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(texts)
        pyarrow.parquet.write_table(table, text / "e.parquet")
        with pyarrow.OSFile(str(text / "e.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        kinds += ["e.parquet", "e.arrow"]
    for file in kinds:
        add("corpus", text / file, partial(rows, text / file))
    saved = folder("saved")
    write(saved / "state.json", {"_data_files": [{"filename": "a.txt"}]})
    write(saved / "a.txt", "words")
    add("state of save_to_disk", saved / "state.json", lambda: open_corpus("text", saved))
    row = {"ind": 1, "ctx": "He", "endings": ["a", "b", "c", "d"], "label": 2, "activity_label": "x"}
    hellaswag = write(text / "hellaswag.jsonl", json.dumps(row) + "\n" + json.dumps(row) + "\n")
    (text / "hellaswag.jsonl.gz").write_bytes(gzip.compress(hellaswag.read_bytes()))
    add("hellaswag", hellaswag, lambda: load_rows(hellaswag))
    add("hellaswag", text / "hellaswag.jsonl.gz", lambda: load_rows(text / "hellaswag.jsonl.gz"))
    lambada = write(text / "lambada.jsonl", lines)
    add("lambada", lambada, lambda: load_lambada(str(lambada)))
    add("wikitext", write(text / "wiki", " = A = \n\n words\n"), lambda: load_wikitext(str(text / "wiki")))
    header = np.zeros(256, "<i4")
    header[:4] = 20240522, 1, 1, 99
    body = np.array([65535, 30, 0, 1, 4, *([2, 5, 6] * 5)], "<u2")
    (text / "h.bin").write_bytes(header.tobytes() + body.tobytes())
    add("llm.c's hellaswag", text / "h.bin", lambda: load_llmc(text / "h.bin"))

    # shards and datasets
    ids = np.arange(300) % 50
    for format in ("llmc", "nanogpt", "npy"):
        write_shard(text / f"s.{format}", ids, format)
        shard = text / f"s.{format}"
        add("shard", shard, partial(lambda file: read_shard(file).map()[0].sum(), shard))
    foreign = folder("foreign")
    for split in ("train", "val"):
        (np.arange(900) ** 2 % 50257).astype("<u4").tofile(foreign / f"{split}.bin")
    (foreign / "meta.pkl").write_bytes(pickle.dumps({"itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}}, 4))
    for file in ("train.bin", "val.bin", "meta.pkl"):
        add("foreign dataset", foreign / file, lambda: Dataset(foreign).max_token())
    (text / "d.txt").write_text("the cat sat on a mat\n" * 40, encoding="utf-8")
    data = prepare(str(text / "d.txt"), out=root / "data", tokenizer="byte", val_fraction=0.2)

    def windows() -> object:
        dataset = Dataset(data)
        dataset.check(257)
        starts = np.arange(0, len(dataset.train) - 8, 16)
        return dataset.train.gather(starts, 8), dataset.tokenizer, dataset.fingerprint()

    for file in ("manifest.json", "tokenizer.json", "train-000000.bin", "val-000000.bin"):
        add("dataset", data / file, windows)
    labels = write(text / "l.jsonl", "".join(json.dumps({"text": f"w {n}", "label": n % 3}) + "\n" for n in range(60)))
    labeled = prepare(str(labels), out=root / "labeled", tokenizer="byte", label_field="label")

    def documents() -> object:
        dataset = LabeledDataset(labeled)
        split = dataset.splits["train"]
        every = np.arange(len(split))
        return split.batch(every, 16), split.targets(every, dataset.n_train_labels), dataset.fingerprint()

    for file in sorted(path.name for path in labeled.iterdir() if path.suffix in (".json", ".npy")):
        if not file.startswith((".", "test")):
            add("labelled dataset", labeled / file, documents)
    record = folder("record")
    asked = {"corpus": "x", "settings": {}, "source": {}, "tokenizer": {}, "format": "llmc"}
    write(record / "progress.json", {**asked, "reader": READER})
    add("record of a preparation", record / "progress.json", lambda: read_record(record, asked, "byte"))

    # tokenizers
    bpe = make_tokenizer("bpe-260", lambda: iter(["the cat sat on the mat"] * 3))
    tokenizers = folder("tokenizers")
    for name, tokenizer in (("bpe", bpe), ("char", make_tokenizer("char", lambda: iter(["abc", "d"])))):
        file = write(tokenizers / f"{name}.json", tokenizer.spec())

        def use(file: Path = file) -> object:
            tokenizer = load_tokenizer(file)
            return tokenizer.encode("a"), tokenizer.token_bytes()

        add("tokenizer", file, use)
    plain = write(tokenizers / "hf.json", bpe.hf_json())
    add("tokenizer", plain, lambda: load_tokenizer(plain).encode("a"))
    model_of = bpe.hf_json()["model"]
    vocabulary = folder("vocabulary")
    write(vocabulary / "vocab.json", model_of["vocab"])
    merges = "\n".join(" ".join(pair) if isinstance(pair, list) else pair for pair in model_of["merges"])
    write(vocabulary / "merges.txt", f"#version: 0.2\n{merges}\n")
    write(
        vocabulary / "special_tokens_map.json", {"eos_token": {"content": "</s>", "lstrip": True}, "pad_token": "[P]"}
    )
    write(vocabulary / "added_tokens.json", {"</s>": 259, "[P]": 260, "more": 261})
    for file in ("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"):
        add("vocabulary", vocabulary / file, lambda: open_tokenizer(str(vocabulary)).encode("a"))
    newer = folder("newer")
    for file in ("vocab.json", "merges.txt"):
        (newer / file).write_bytes((vocabulary / file).read_bytes())
    listed = {"259": {"content": "</s>", "special": True}, "260": {"content": "more", "normalized": False}}
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "added_tokens_decoder": listed}
    write(newer / "tokenizer_config.json", settings)
    add("vocabulary", newer / "tokenizer_config.json", lambda: open_tokenizer(str(newer)).encode("a"))

    # other people's models
    shape: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 260}
    hf = root / "hf"
    export_hf(build_model(Model(**shape), "cpu", init=0), bpe, hf)

    def model() -> object:
        config, init = import_hf(hf)
        if config.n_embd > 999 or config.vocab_size > 9999 or config.n_layer > 99 or config.block_size > 9999:
            return None  # a whole shape, and too large to build in a test
        return build_model(config, "cpu", init=init), source_tokenizer(hf)

    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        add("Hugging Face model", hf / file, model)
    sharded = folder("sharded")
    for file in ("config.json", "model.safetensors"):
        (sharded / file.replace("model.", "model-00001-of-00001.")).write_bytes((hf / file).read_bytes())
    names = ["wte.weight", "wpe.weight"]
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    write(sharded / "model.safetensors.index.json", index)
    add("Hugging Face index", sharded / "model.safetensors.index.json", lambda: import_hf(sharded))
    encoder = folder("encoder")
    write(encoder / "config.json", {"model_type": "roberta", "hidden_size": 8, "num_attention_heads": 2, "x": None})
    (encoder / "model.safetensors").write_bytes((hf / "model.safetensors").read_bytes())
    add("encoder", encoder / "config.json", lambda: read_encoder(encoder, 0))
    torch.save({"model": {}, "model_args": {**shape, "bias": False}, "iter_num": 1}, text / "ckpt.pt")
    add("nanoGPT", text / "ckpt.pt", lambda: import_nanogpt(text / "ckpt.pt"))
    recorded = {**shape, "best": np.float64(1.5), "at": Path("x"), "settings": Namespace(lr=1e-3)}
    torch.save(
        {"state_dict": {"model.wte.weight": torch.ones(2)}, "hyper_parameters": recorded}, text / "lightning.ckpt"
    )
    add("Lightning", text / "lightning.ckpt", lambda: import_nanogpt(text / "lightning.ckpt"))
    sparse = folder("sparse")
    write(sparse / "config.json", {"format": "gptlab-sparse24", "version": 1, "dtype": "float32", "model": shape})
    add("2:4 model", sparse / "config.json", lambda: load_sparse24(sparse))
    return found


# -- damage

OTHER_KINDS = [
    *(b"", b"[]", b"null", b"3", b'"x"', b"true", b"NaN", b"{", b"{}", b'{"a": NaN}', b'{"a": 1e999}'),
    *(b"\xff\xfe{", b"\0" * 200, b'{"a": "\\ud800"}', b'{"a": ' + b"9" * 5000 + b"}", b"a = " + b"9" * 5000),
    *(b"[" * 100_000, b'{"a":' * 100_000, b"a = " + b"[" * 100_000, b"[" * 500 + b"]" * 500, b"\x93NUMPY\x01\0v\0{"),
]
VALUES: list[Any] = [
    None,
    [],
    {},
    [[]],
    "",
    "x",
    "../../x",
    "a\0b",
    0,
    -1,
    3,
    2**31,
    2**62,
    1.5,
    1e308,
    True,
    [1],
    {"": 1},
]


def flipped(content: bytes, draw: random.Random) -> bytes:
    """One bit is another."""
    at = draw.randrange(8 * len(content))
    changed = bytearray(content)
    changed[at // 8] ^= 1 << at % 8
    return bytes(changed)


def with_other_values(content: bytes) -> Iterator[bytes]:
    """A JSON file, or each line of one, with every value in turn replaced by each of VALUES."""
    try:
        whole = json.loads(content)
    except ValueError:
        return

    def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        for key in list(keys)[:12]:  # a vocabulary has hundreds
            yield (*path, key)
            yield from places(value[key], (*path, key))

    for *path, last in places(whole):
        for value in VALUES:
            changed = json.loads(content)
            inner = changed
            for key in path:
                inner = inner[key]
            inner[last] = value
            yield json.dumps(changed).encode()


def mutated(content: bytes, draw: random.Random) -> bytes:
    """What accidents and strangers make of a file: some bytes are others, gone, doubled, or a token of JSON or TOML."""
    data = bytearray(content)
    tokens = [
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b'"',
        b"null",
        b"NaN",
        b"-1",
        b"1e999",
        b"\n",
        b"\xff",
        b"\0",
        b"=",
        b"\\",
    ]
    for _ in range(draw.choice([1, 1, 1, 2, 5, 20])):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(5):
            case 0:
                data[at:at] = draw.choice(tokens)
            case 1:
                del data[at : at + draw.choice([1, 2, 10, 200])]
            case 2:
                data[at : at + 1] = bytes([draw.randrange(256)])
            case 3:
                data[at:at] = data[at : at + draw.choice([1, 10, 200])]
            case 4:
                data = bytearray(flipped(bytes(data), draw)) if data else data
    return bytes(data)
