"""Token shards of other trainers: folders without a manifest, and packers that are refused by name."""

from __future__ import annotations

import contextlib
import itertools
import pickletools
import sys
from pathlib import Path
from typing import Any

from gptlab.data.containers import INSTEAD, Shard, packer, read_shard
from gptlab.data.corpora.base import SPLITS
from gptlab.data.corpora.splits import splits_of
from gptlab.data.manifest import refuse_unfinished
from gptlab.data.tokenizers import END_OF_TEXT, CharTokenizer
from gptlab.errors import DataError
from gptlab.files import open_regular, read_json, refuse_pointer

# Datasets of other packers, by the ending of a file in them.
ENDINGS = {
    ".idx": "Megatron-LM's or fairseq's indexed shards (.bin with .idx)",
    ".ds": "datatrove's shards for nanoset (.ds)",
    ".mds": "MosaicML's streaming shards (.mds)",
    ".tar": "WebDataset's shards (.tar)",
    ".tfrecord": "TFRecord shards (.tfrecord)",
    ".arrow": "a folder of Hugging Face datasets (.arrow)",
    ".parquet": "rows of text (.parquet)",
    ".jsonl": "rows of text (.jsonl)",
    ".txt": "text (.txt)",
}
INDEX_KEYS = {  # of an index.json
    "chunks": "LitData's chunks (index.json)",
    "shards": "MosaicML's streaming shards (index.json)",
}


def foreign_shards(folder: Path, say: bool) -> dict[str, list[Shard]]:
    """nanoGPT's train.bin and val.bin, or all files with a word for train or val in their name. Test files are left.

    Args:
        say: name files that are left out, because their name has none of these words.

    Raises:
        DataError: a split has no shards, a name says two splits, a shard is none, or the widths of ids differ.
    """
    refuse_unfinished(folder)
    files: dict[str, list[Path]] = {"train": [], "val": [], "test": [], "": []}
    for file in sorted(folder.iterdir()):
        if file.suffix not in (".bin", ".npy") or file.name.startswith("."):
            continue
        said = [split for split in SPLITS if split in splits_of(file.stem)]
        if len(said) > 1:
            raise DataError(
                f"{file} says both {' and '.join(said)} in its name, and a file belongs to one split: rename it, or "
                "move it out of the folder"
            )
        if file.suffix == ".bin" and file.with_suffix(".idx").is_file():
            raise DataError(f"{file} is one of {ENDINGS['.idx']}, which gptlab does not read: {INSTEAD}")
        files[said[0] if said else ""].append(file)
    missing = [split for split in ("train", "val") if not files[split]]
    if missing:
        if len(missing) == 2 and (whose := _other_packer(folder)):
            raise DataError(f"{folder} holds {whose}, which gptlab does not read as token ids: {INSTEAD}")
        what = " and no ".join(f"{split} shard ({split}.bin, *_{split}_*.npy or .bin)" for split in missing)
        raise DataError(f"{folder} is not a prepared dataset: it has no manifest.json and no {what}")
    if say and files[""]:
        names = ", ".join(file.name for file in files[""][:3]) + (", ..." if len(files[""]) > 3 else "")
        print(f"{folder}: left out, for no word for train or val in the name: {names}", file=sys.stderr)
    both = files["train"] + files["val"]
    largest = read_shard(max(both, key=lambda file: file.stat().st_size if file.is_file() else 0))
    width = largest.dtype.itemsize if largest.format == "nanogpt" else 0
    splits = {split: [read_shard(file, width=width) for file in files[split]] for split in ("train", "val")}
    for shard in splits["train"] + splits["val"]:
        if shard.format == largest.format == "nanogpt" and shard.dtype != largest.dtype:
            raise DataError(
                f"{shard.path} holds {shard.dtype} ids, and {largest.path} {largest.dtype}: write both alike"
            )
    return splits


def _other_packer(folder: Path) -> str:
    """Whose dataset a folder holds, by the files in it or directly below it; "" if nothing tells."""
    found = list(itertools.islice(itertools.chain(folder.iterdir(), folder.glob("*/*")), 10**4))
    for index in (path for path in found if path.name == "index.json"):
        with contextlib.suppress(DataError, OSError):
            keys = read_json(index, DataError)
            for key, whose in INDEX_KEYS.items():
                if key in keys:
                    return whose
    for path in [path for path in found if path.suffix == ".bin"][:3]:
        with contextlib.suppress(OSError), open_regular(path) as file:
            if whose := packer(file.read(8)):
                return whose
    endings = {path.suffix.lower() for path in found}
    return next((whose for ending, whose in ENDINGS.items() if ending in endings), "")


def foreign_manifest(splits: dict[str, list[Shard]]) -> dict[str, Any]:
    shards = [shard for split in splits.values() for shard in split]
    meta = shards[0].path.with_name("meta.pkl")
    vocab_size = nanogpt_characters(meta).vocab_size if meta.is_file() else 0
    return {
        "format": shards[0].format,
        "version": 0,
        "corpus": "",
        "tokenizer": {"name": "", "vocab_size": vocab_size, "eot": None},
        "dtype": str(shards[0].dtype),
        "splits": {
            name: {
                "tokens": sum(shard.tokens for shard in split),
                "shards": [{"file": shard.path.name, "tokens": shard.tokens} for shard in split],
            }
            for name, split in splits.items()
        },
    }


def nanogpt_characters(path: Path) -> CharTokenizer:
    """The vocabulary in nanoGPT's meta.pkl, read from the pickle's opcodes; nothing is unpickled.

    The content is {"vocab_size": n, "itos": {id: character}, "stoi": ...}: pairs of ids and characters follow the word
    itos. After them may stand end-of-text, as `prepare` writes it. Anything else is refused.
    """
    try:
        refuse_pointer(path, path.read_bytes()[:100], DataError)
        atoms = [argument for _, argument, _ in pickletools.genops(path.read_bytes()) if argument is not None]
        memo = [atom for atom in atoms[atoms.index("itos") + 1 :] if isinstance(atom, str)]
        tokens = memo[: memo.index("stoi")]
        if end_of_text := tokens[-1:] == [END_OF_TEXT]:
            tokens.pop()
        if tokens != sorted(set("".join(tokens))):
            raise ValueError
    except DataError:
        raise
    except (OSError, ValueError, IndexError):
        raise DataError(f"{path} is not the character vocabulary that nanoGPT writes: prepare the text again") from None
    return CharTokenizer("".join(tokens), end_of_text)
