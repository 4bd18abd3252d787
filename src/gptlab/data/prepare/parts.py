"""Parts of a dataset, each prepared by another machine, and their merging."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from gptlab.data.containers import read_shard
from gptlab.data.corpora.base import Part, Reading
from gptlab.data.labeled import LabeledDataset
from gptlab.data.manifest import INEXACT, read_manifest
from gptlab.data.prepare.folder import differences, has_tokenizer, lock, write_manifest
from gptlab.data.prepare.summary import joined_reading
from gptlab.data.prepare.writer import LabeledOutput, Piece, new_states, shard_name
from gptlab.data.tokenizers import load_tokenizer
from gptlab.errors import DataError
from gptlab.files import read_json


def part_folder(folder: Path, part: Part) -> Path:
    return folder / "part-{:04d}-of-{:04d}".format(*part)


def parse_part(text: str, format: str, tokenizer: str) -> Part:
    """I/N as two numbers. Raises DataError if it is not that, or if the other settings do not allow parts."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= 9999:
        raise DataError(f"part {text}: give I/N, a number from 1 to N and the number of parts, such as 1/8")
    if format == "nanogpt":
        raise DataError("format nanogpt has one file a split, so it cannot be made in parts: use --format llmc or npy")
    if tokenizer == "char" or tokenizer.startswith("bpe-"):
        raise DataError(
            f"tokenizer {tokenizer} would be learnt again by each part: prepare some of the text without --part, "
            "and give the tokenizer.json made there to --tokenizer"
        )
    return int(match[1]), int(match[2])


def merge(folder: Path) -> dict[str, Any]:
    """Make one dataset of the parts in a folder, and remove the parts. A merge that was killed can be run again.

    The shards of text are renamed, part after part, and not copied. Labelled documents are copied in the order of the
    corpus, so the dataset is the same as without parts. Returns the manifest, which is written last.

    Raises:
        DataError: a part is missing, unfinished, or made with other settings than the first.
    """
    parts = sorted(path for path in folder.glob("part-*-of-*") if path.is_dir())
    merged = (folder / "manifest.json").is_file()
    if not parts and not merged:
        raise DataError(f"{folder} has no parts: `gptlab prepare ... --part I/N` makes them, in one --out")
    with lock(folder):
        manifest = _manifest(folder) if merged else _merge(folder, parts)
        if any(_has_more(part, folder, manifest) for part in parts):
            raise DataError(f"{folder} holds a finished dataset beside the parts: prepare them into another --out")
        for part in parts:
            shutil.rmtree(part)
    return manifest


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a dataset, or of a part as if it were no part."""
    labeled = read_json(folder / "manifest.json", DataError).get("kind") == "labeled"
    manifest = read_manifest(folder, labeled)
    if isinstance(manifest.get("settings"), dict):
        manifest["settings"].pop("part", None)
    return manifest


def _has_more(part: Path, folder: Path, merged: dict[str, Any]) -> bool:
    """Whether a part holds files that are not in the merged dataset: shards, or labelled documents of another one."""
    if not any(path.suffix in (".bin", ".npy") for path in part.iterdir()):
        return False
    labeled = "kind" in merged and (part / "manifest.json").is_file()
    return not labeled or bool(differences(part, _manifest(part), merged, folder / "tokenizer.json"))


def _merge(folder: Path, parts: list[Path]) -> dict[str, Any]:
    total = int(parts[0].name.rpartition("-")[2])
    wanted = [part_folder(folder, (index, total)) for index in range(1, total + 1)]
    if strangers := [part for part in parts if part not in wanted]:
        other = int(strangers[0].name.rpartition("-")[2])
        raise DataError(f"{folder} contains parts of two different splits (.../{total} and .../{other}): keep one set")
    if missing := [index for index, part in enumerate(wanted, 1) if not (part / "manifest.json").is_file()]:
        raise DataError(
            f"{folder}: {len(missing)} of {total} parts are not finished: prepare them with --part {missing[0]}/{total}"
            + (", ..." if len(missing) > 1 else "")
        )
    manifests = [_manifest(part) for part in parts]
    for part, manifest in zip(parts, manifests, strict=True):
        first = parts[0] / "tokenizer.json"
        found = differences(part, manifest, manifests[0], first, other=f"in {parts[0].name}")
        if not found and manifest["tokenizer"] != manifests[0]["tokenizer"] and not has_tokenizer(part, first):
            found = f"another tokenizer.json than {parts[0].name}"
        if found:
            raise DataError(f"{part} was made with {found}: delete the wrong one and prepare it again")
    fields = (_join_labeled if "kind" in manifests[0] else _join_shards)(folder, parts, manifests)
    shutil.copyfile(parts[0] / "tokenizer.json", folder / "tokenizer.json")
    return write_manifest(folder, {**manifests[0], **fields})


def _join_shards(folder: Path, parts: list[Path], manifests: list[dict[str, Any]]) -> dict[str, Any]:
    splits = {}
    if not any(manifest["splits"]["train"]["tokens"] for manifest in manifests):
        raise DataError(f"{folder}: no part has a token for training: hold out less, or see what they did not read")
    for split in ("train", "val"):
        shards: list[dict[str, Any]] = []
        for part, manifest in zip(parts, manifests, strict=True):
            for entry in manifest["splits"][split]["shards"]:
                target = folder / shard_name(manifest["format"], manifest["corpus"], split, len(shards))
                if (part / entry["file"]).is_file():
                    if target.exists():
                        raise DataError(f"{target} is in the way of a shard of {part.name}: move it elsewhere")
                    os.replace(part / entry["file"], target)
                if read_shard(target, manifest["format"]).tokens != entry["tokens"]:
                    raise DataError(
                        f"{target} is not the shard that {part.name} recorded: delete both and prepare them again"
                    )
                shards.append({**entry, "file": target.name})
        keys = [key for key in ("tokens", "documents", "bytes", *INEXACT) if key in manifests[0]["splits"][split]]
        counts = {key: sum(m["splits"][split][key] for m in manifests) for key in keys}
        splits[split] = {**counts, "shards": shards}
    left_out = sum((Counter(m.get("left_out", {})) for m in manifests), Counter[str]())
    more = {"left_out": dict(sorted(left_out.items()))} if left_out else {}
    settings = {**manifests[0]["settings"], "parts": len(parts)}
    return {"settings": settings, **more, "splits": splits, **joined_reading(manifests)}


def _join_labeled(folder: Path, parts: list[Path], manifests: list[dict[str, Any]]) -> dict[str, Any]:
    first, datasets = manifests[0], [LabeledDataset(part) for part in parts]
    output = LabeledOutput(folder, first, load_tokenizer(parts[0] / "tokenizer.json"), new_states(LabeledOutput))
    for split, writer in output.writers.items():
        found = [m["splits"][split] for m in manifests if split in m["splits"]]
        writer.state |= {key: sum(m[key] for m in found) for key in ("bytes", *INEXACT) if found and key in found[0]}
        sources = [(dataset.labels, dataset.splits[split]) for dataset in datasets if split in dataset.splits]
        for row in range(max((len(source) for _, source in sources), default=0)):
            for names, source in sources:  # the documents were dealt out in turn
                if row < len(source):
                    ids, labels = source.tokens(row), [names[number] for number in source.label_ids(row)]
                    writer.write(Piece(split, ids, 1, 0, [(len(ids), labels)]))
    output.close(first["corpus"], whole=True)
    reading = Reading(multi=first["multi"])
    reading.left_out.update(first["left_out"])  # each part counts those of the whole corpus, but for its own
    reading.left_out["token ids"] = sum(manifest["left_out"].get("token ids", 0) for manifest in manifests)
    return {**output.finish(reading), **{key: first[key] for key in ("read", "reading") if key in first}}
