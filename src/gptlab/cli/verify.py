"""gptlab verify"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptlab.cli.common import add_json, add_verb, json_too, named
from gptlab.errors import DataError, UserError
from gptlab.progress import Progress
from gptlab.status import EXIT_CODES

Read = Callable[[int], None]


def add_to(verbs: Any) -> None:
    help = "Read every file of a dataset, a run or a study, and compare it with what was recorded when it was written."
    v = add_verb(verbs, "verify", do_verify, help)
    v.add_argument("folder", type=named, metavar="DATASET|RUN|STUDY", help="the folder")
    add_json(v)


def do_verify(options: argparse.Namespace) -> int:
    """Print what was read, of a study a line for each run, and what is damaged; a damaged file is a failure."""
    folder, damage = options.folder, 0
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name a prepared dataset, a run directory or a study's folder")
    done, total = 0, 0

    def read(size: int) -> None:
        nonlocal done
        done += size
        shown.tell(f"reading {folder}", done, total)

    if (folder / "study.toml").is_file():
        found = _study(folder, read)
    else:
        found = _run(folder, read) if (folder / "recipe.toml").is_file() else _dataset(folder, read)
    rows: list[dict[str, str | None]] = []
    with json_too(options.json) as tell:
        while True:
            with Progress(f"reading {folder}") as shown:
                total = total or sum(map(_size, folder.rglob("*")))
                one = next(found, None)
            if one is None:
                break
            what, fault = one
            damage += bool(fault)
            rows.append({"what": what, "fault": fault or None})
            print(fault or f"{what}: as written", flush=True)
        tell(rows)
    return EXIT_CODES["failed"] if damage else 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # it was removed meanwhile
        return 0


def _dataset(folder: Path, read: Read) -> Iterator[tuple[str, str]]:
    from gptlab.data.labeled import LabeledDataset
    from gptlab.data.shards import Dataset
    from gptlab.files import read_json

    manifest = folder / "manifest.json"
    try:
        labeled = manifest.is_file() and read_json(manifest, DataError).get("kind") == "labeled"
        dataset = LabeledDataset(folder) if labeled else Dataset(folder)
    except DataError as error:
        if not manifest.is_file():  # not a damaged dataset, but none
            raise
        yield str(folder), str(error)
        return
    yield str(folder), _fault(lambda: dataset.verify(read))


def _run(folder: Path, read: Read) -> Iterator[tuple[str, str]]:
    from gptlab.data.tokenizers import load_tokenizer
    from gptlab.rundir import RunDir
    from gptlab.training.checkpoint import list_checkpoints, verify

    run = RunDir(folder)
    yield str(run.recipe_file), _fault(run.read_recipe)
    for name in ("environment.json", "result.json"):
        if (folder / name).is_file():
            yield str(folder / name), _fault(lambda name=name: run.read_json(name))
    if run.tokenizer_file.is_file():
        yield str(run.tokenizer_file), _fault(lambda: load_tokenizer(run.tokenizer_file))
    if run.metrics_file.is_file():
        lines = len(run.read_metrics())
        fault = f"{run.metrics_file}: {run.damaged_lines} lines are damaged" if run.damaged_lines else ""
        yield f"{run.metrics_file}, {lines} lines", fault
    for path in list_checkpoints(run):
        yield str(path), _fault(lambda path=path: verify(path, read=read))


def _study(folder: Path, read: Read) -> Iterator[tuple[str, str]]:
    from gptlab.rundir import RunDir, open_study, read_plan

    study = open_study(folder)
    yield str(folder / "study.toml"), _fault(lambda: read_plan(folder, study))
    summaries = {file.stem: file for file in folder.glob("*_seed*.json")}
    runs = {recipe.parent.name: recipe.parent for recipe in folder.glob("*_seed*/recipe.toml")}
    for name in sorted(summaries | runs):
        found = list(_run(runs[name], read)) if name in runs else []
        if name in summaries:
            file = summaries[name]
            found.append((str(file), _fault(lambda file=file: RunDir(folder).read_json(file.name))))
        whole = f"{folder / name}, {len(found)} files and checkpoints"
        yield from [(what, fault) for what, fault in found if fault] or [(whole, "")]


def _fault(read: Any) -> str:
    """What is wrong with what `read` reads, one sentence; "" if nothing is."""
    try:
        read()
    except (UserError, OSError) as error:
        return str(error)
    return ""
