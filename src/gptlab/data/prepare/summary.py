"""What was prepared, in lines for the end of `gptlab prepare`, and what was left out of it, for the manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptlab.data.corpora.base import Reading
from gptlab.data.corpora.files import FAULTS
from gptlab.data.manifest import MOST_LOST, lost_share
from gptlab.errors import DataError
from gptlab.files import damaged, printable

MOST_NAMES, SHOWN_NAMES = 1000, 10  # of the files of a reason: in the manifest, and in the summary
SHOWN_READ = 5  # of the files of a split


def reading_fields(reading: Reading) -> dict[str, Any]:
    """The manifest's field `reading`; {} if every file and every row was read."""
    fields: dict[str, Any] = {"unread": reading.unread}
    for reason, rows in sorted(reading.left_out.items()):
        fields.setdefault("left_out", {})[reason] = {"rows": rows, "first": _one_line(reading.first[reason])}
    for key, groups in (("skipped", reading.skipped), ("noted", reading.noted)):
        for reason, names in sorted(groups.items()):
            fields.setdefault(key, {})[reason] = listing(names)
    return {"reading": fields} if len(fields) > 1 else {}


def listing(names: list[str]) -> dict[str, Any]:
    """How many files there are, and the names of the first."""
    return {"files": len(names), "names": [_one_line(name) for name in names[:MOST_NAMES]]}


def joined_reading(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """The field `reading` of the parts of a dataset together; {} if no part has one."""
    parts = [manifest["reading"] for manifest in manifests if "reading" in manifest]
    whole: dict[str, Any] = {"unread": sum(part["unread"] for part in parts)}
    for key in ("left_out", "skipped", "noted"):
        for reason in sorted({reason for part in parts for reason in part.get(key, {})}):
            groups = [part[key][reason] for part in parts if reason in part.get(key, {})]
            if key == "left_out":
                entry = {"rows": sum(group["rows"] for group in groups), "first": groups[0]["first"]}
            else:
                names = [name for group in groups for name in group["names"]]
                entry = {"files": sum(group["files"] for group in groups), "names": names[:MOST_NAMES]}
            whole.setdefault(key, {})[reason] = entry
    return {"reading": whole} if parts else {}


def lacks_something(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether rows or files were left out that `--strict` refuses. Raises DataError if the manifest is damaged."""
    with damaged(folder / "manifest.json", DataError):
        reading = manifest.get("reading", {})
        found = manifest.get("left_out") or reading.get("left_out") or FAULTS.intersection(reading.get("skipped", {}))
        return bool(found)


def summary(folder: Path, manifest: dict[str, Any]) -> str:
    """What a dataset holds, and on further lines what was not read.

    Raises:
        DataError: the manifest is damaged.
    """
    with damaged(folder / "manifest.json", DataError):
        lines = [_labeled(manifest) if manifest.get("kind") == "labeled" else _text(manifest)]
        return "\n  ".join([*lines, *_not_read(manifest.get("reading", {})), *_not_taken(manifest)])


def _not_taken(manifest: dict[str, Any]) -> Iterator[str]:
    """What the tokenizer left of the text."""
    if refused := manifest.get("left_out", {}).get("token ids", 0):
        were = "was" if refused == 1 else "were"
        yield f"the tokenizer could not take {_count(refused, 'document')}, which {were} left out"
    if lost := lost_share(manifest):
        no_unit = lost > MOST_LOST and manifest.get("kind") != "labeled"
        unit = ", so that no val_bits_per_byte will be given" * no_unit
        yield f"the tokenizer drops or changes {100 * lost:.2g}% of the bytes of the text{unit}"


def _text(manifest: dict[str, Any]) -> str:
    splits, source, settings = manifest["splits"], manifest["source"], manifest["settings"]
    each = [split["documents"] for split in splits.values()]
    text = " and ".join(f"{splits[split]['tokens']:,} {split} tokens" for split in ("train", "val"))
    if each != [1, 1]:  # a single document may have been cut in two
        text += f", {_count(sum(each), 'document')}"
    files = source.get("files", 1 if "sha256" in source else 0) if isinstance(source, dict) else 0
    files -= manifest.get("reading", {}).get("unread", 0)
    known = files > 0 and "part" not in settings and not settings.get("max_documents")
    return text + (f" from {_count(files, 'file')}" if known else "")


def _not_read(reading: dict[str, Any]) -> Iterator[str]:
    for reason, entry in reading.get("left_out", {}).items():
        yield f"left out ({reason}): {_count(entry['rows'], 'row')}, the first is {entry['first']}"
    for key, what in (("skipped", "not read"), ("noted", "read all the same")):
        for reason, entry in reading.get(key, {}).items():
            shown = "; ".join(entry["names"][:SHOWN_NAMES])
            more = f"; and {entry['files'] - SHOWN_NAMES:,} more" if entry["files"] > SHOWN_NAMES else ""
            yield f"{what} ({reason}): {shown}{more}"


def _labeled(manifest: dict[str, Any]) -> str:
    splits = manifest["splits"]
    sizes = ", ".join(f"{entry['documents']:,} {name}" for name, entry in splits.items())
    tokens, labels, documents = (sum(e[key] for e in splits.values()) for key in ("tokens", "labels", "documents"))
    unseen = f" ({manifest['unseen_labels']:,} never in train)" if manifest["unseen_labels"] else ""
    left_out = "".join(f", {number:,} left out without {what}" for what, number in manifest["left_out"].items())
    names, each = len(manifest["labels"]), labels / max(documents, 1)
    lines = [f"{sizes} documents, {tokens:,} tokens, {names:,} labels{unseen}, {each:.2f} a document{left_out}"]
    read = manifest.get("read", {})
    for split, entry in read.items():
        shown, many = entry["names"][:SHOWN_READ], entry["files"] > SHOWN_READ
        without = "" if split in splits else ", without labelled documents"
        lines.append(
            f"{split} is " + f"{entry['files']:,} files: " * many + ", ".join(shown) + ", ..." * many + without
        )
    if read and "val" not in read and "val" in splits:
        lines.append("val is held out of train")
    return "\n  ".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _one_line(name: str) -> str:
    return printable(name).replace("\n", "\\n")
