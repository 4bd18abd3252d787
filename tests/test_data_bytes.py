"""Prepared datasets are, byte for byte, those of version 0.1.0: token ids, containers, splits, labels, manifests.

The names of the files that were read, which later versions record, are left out.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from gptlab.data.prepare import prepare


def write_sources(root: Path) -> None:
    texts = [
        f"Document {index}: " + f"na\u00efve \u4f60\u597d {index * index} " * (index % 9 + 1) for index in range(240)
    ]
    (root / "docs/sub").mkdir(parents=True)
    for index, text in enumerate(texts[:60]):
        (root / "docs" / ("sub" if index % 7 == 0 else ".") / f"{index:02d}.txt").write_text(text, encoding="utf-8")
    for number in range(3):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[60 + 40 * number : 100 + 40 * number])
        (root / f"docs/{number}.jsonl").write_text(lines, encoding="utf-8")
    (root / "play.txt").write_text("\n".join(texts), encoding="utf-8")
    (root / "labels").mkdir()
    for name, rows in (("train", texts), ("dev", texts[:60]), ("test", texts[200:])):
        with (root / f"labels/{name}.jsonl").open("w", encoding="utf-8") as file:
            for index, text in enumerate(rows):
                tags = [f"{name[0] if label % 5 == 0 else ''}{label}" for label in range(index % 23, index, 31)]
                file.write(json.dumps({"text": text, "tags": tags, "kind": index % 11}) + "\n")


def digest(folder: Path) -> str:
    """Of the names and contents of the files, without what the manifest records since."""
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name[0] != ".":
            content = path.read_bytes()
            if path.name == "manifest.json":
                manifest = json.loads(content)
                assert list(manifest)[-1] == "gptlab"
                for later in ("gptlab", "read", "reading"):
                    manifest.pop(later, None)
                content = json.dumps(manifest).encode()
            whole.update(f"{path.name} {len(content)}\n".encode() + content)
    return whole.hexdigest()


@pytest.mark.parametrize(
    ("corpus", "settings", "expected"),
    [
        (
            "docs",
            {"tokenizer": "gpt2", "shard_tokens": 900},
            "ac69aecce5c36ac2837c86af57ab7467470598fe579b6191a844ac862b7c9e1e",
        ),
        (
            "docs",
            {"tokenizer": "char", "format": "npy", "val_fraction": 0.1, "max_documents": 150},
            "e2b8dd82e8d4d728a19b4550d5eee9f95026b61296447eee87f8dfcde1ef4f8f",
        ),
        (
            "docs",
            {"tokenizer": "gpt2", "format": "nanogpt", "val_tokens": 777},
            "b735f8468a0993a626a677e5c1b338e9a5e121095cdf2351dfb6c6adce939e5b",
        ),
        (
            "shakespeare",
            {"tokenizer": "char", "source": "play.txt"},
            "423268e118acceda325d8940176d2e00da6344f26eaac7f34c819c0e49b45f10",
        ),
        (
            "labels",
            {"tokenizer": "gpt2", "label_field": "tags"},
            "bab2a4822a5965648068c4c0edec6d0bc465013fa645a52e4e4cd27838df01fb",
        ),
        (
            "labels",
            {"tokenizer": "char", "label_field": "kind", "max_documents": 70},
            "f2f7e5c8da76c6c3475a7fa42d8292d4d0151a5221f881d124469b46764442b7",
        ),
        (
            "labels/train.jsonl",
            {"tokenizer": "byte", "label_field": "tags", "val_fraction": 0.2},
            "e1d3fabc61c19cef7ecba6a81c4de3181123707aa0668da24b28167e397a14d3",
        ),
    ],
)
def test_bytes(
    corpus: str, settings: dict[str, Any], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the manifest has the path of the source
    write_sources(Path("."))
    assert digest(prepare(corpus, out="set", progress=False, **settings)) == expected


def test_bytes_of_merged_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_sources(Path("."))
    for index in (1, 2):
        prepare("docs", out="set", part=f"{index}/2", tokenizer="gpt2", shard_tokens=900, progress=False)
    assert (
        digest(prepare("docs", out="set", merge=True, progress=False))
        == "3d90aa58fe9a83347ac8a2b26fc10f139912d1c56038a478b16e6881d3b2bce6"
    )
