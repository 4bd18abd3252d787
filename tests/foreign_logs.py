"""Logs of other tools, written byte by byte, for where the tool itself is not installed. Each is as the tool wrote it:
wandb 0.31, MLflow 3.17 and trackio 0.43 were looked at."""

import contextlib
import json
import math
import sqlite3
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Rows = list[tuple[int, dict[str, Any]]]

# -- Weights & Biases -----------------------------------------------------------------------------------------------


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def message(*fields: tuple[int, int | float | str | bytes]) -> bytes:
    """A protocol buffer."""
    made = b""
    for number, value in fields:
        if isinstance(value, int):
            made += _varint(number << 3) + _varint(value)
        elif isinstance(value, float):
            made += _varint(number << 3 | 1) + struct.pack("<d", value)
        else:
            value = value.encode() if isinstance(value, str) else value
            made += _varint(number << 3 | 2) + _varint(len(value)) + value
    return made


def wandb_log(records: Iterable[bytes]) -> bytes:
    """Records in LevelDB's form, as W&B writes it."""
    made = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
    for record in records:
        rest, first = record, True
        while first or rest:
            room = 32768 - len(made) % 32768
            if room < 7:
                made += bytes(room)
                room = 32768
            piece, rest = rest[: room - 7], rest[room - 7 :]
            kind = bytes([(1 if first else 4) if not rest else 2 if first else 3])
            made += struct.pack("<IH", zlib.crc32(kind + piece), len(piece)) + kind + piece
            first = False
    return made


def wandb_items(values: Mapping[str, Any], key: int = 2) -> list[tuple[int, bytes]]:
    """Items of a history (key 2: nested_key) or a config (key 1)."""
    return [
        (1, message(*((key, part) for part in name.split(".")), (16, json.dumps(value))))
        for name, value in values.items()
    ]


def wandb_records(
    rows: Rows, config: Mapping[str, Any] | None = None, exit_code: int | None = 0, group: str = "", name: str = "a-0"
) -> list[bytes]:
    """The records of a run."""
    run = message((1, "abc123"), (3, "project"), (4, message(*wandb_items(config or {}, 1))), (6, group), (8, name))
    made = [message((1, 1), (21, message((1, message((1, "0.31.0")))))), message((1, 2), (17, run))]
    for step, row in rows:
        every = row | {"_step": step, "_runtime": 0.5}
        made.append(message((3, message(*wandb_items(every)))))
        made.append(message((2, message(*wandb_items(every), (2, message((1, step)))))))
    if exit_code is not None:
        made.append(message((18, message((1, exit_code)))))
    return made


def write_wandb(folder: Path, records: Iterable[bytes], date: str = "20260101_000000", run: str = "abc123") -> Path:
    file = folder / "wandb" / f"offline-run-{date}-{run}" / f"run-{run}.wandb"
    file.parent.mkdir(parents=True)
    file.write_bytes(wandb_log(records))
    return file


# -- MLflow ---------------------------------------------------------------------------------------------------------

EXPERIMENT = """artifact_location: file:///home/someone/mlruns/364120237829291904
creation_time: 1795881619962
effective_trace_archival_retention: null
experiment_id: '364120237829291904'
last_update_time: 1795881619962
lifecycle_stage: active
name: exp
trace_location: null
workspace: default
"""
RUN = """artifact_uri: file:///home/someone/mlruns/364120237829291904/{run}/artifacts
end_time: 1795881620080
entry_point_name: ''
experiment_id: '364120237829291904'
lifecycle_stage: {stage}
run_id: {run}
run_name: {name}
source_name: ''
source_type: 4
source_version: ''
start_time: 1795881620052
status: {status}
tags: []
user_id: someone
"""


def write_mlflow(
    store: Path, name: str, rows: Rows, params: Mapping[str, str], status: int = 3, stage: str = "active"
) -> Path:
    """A run in MLflow's file store."""
    experiment = store / "364120237829291904"
    run = experiment / f"{zlib.crc32(name.encode()):032x}"
    for part in ("metrics", "params", "tags", "artifacts"):
        (run / part).mkdir(parents=True)
    for default in (store / "0", experiment):
        default.mkdir(exist_ok=True)
        (default / "meta.yaml").write_text(EXPERIMENT)
    (run / "meta.yaml").write_text(RUN.format(run=run.name, name=name, status=status, stage=stage))
    (run / "tags" / "mlflow.runName").write_text(name)
    for param, value in params.items():
        (run / "params" / param).write_text(value)
    for step, row in rows:
        for metric, value in row.items():
            file = run / "metrics" / metric
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a") as opened:
                opened.write(f"1795881620067 {value} {step}\n")
    return run


def write_mlflow_sqlite(
    file: Path, runs: Mapping[str, Rows], params: Mapping[str, str], status: str = "FINISHED"
) -> None:
    """MLflow's database, of which what is not read is left out."""
    with contextlib.closing(sqlite3.connect(file)) as store:
        store.executescript("""
            CREATE TABLE experiments (experiment_id INTEGER NOT NULL PRIMARY KEY, name VARCHAR(256) NOT NULL);
            CREATE TABLE runs (run_uuid VARCHAR(32) NOT NULL PRIMARY KEY, name VARCHAR(250), status VARCHAR(9),
                lifecycle_stage VARCHAR(20), experiment_id INTEGER);
            CREATE TABLE metrics ("key" VARCHAR(250) NOT NULL, value FLOAT NOT NULL, timestamp BIGINT NOT NULL,
                run_uuid VARCHAR(32) NOT NULL, step BIGINT DEFAULT '0' NOT NULL, is_nan BOOLEAN DEFAULT '0' NOT NULL,
                PRIMARY KEY ("key", timestamp, step, run_uuid, value, is_nan));
            CREATE TABLE params ("key" VARCHAR(250) NOT NULL, value VARCHAR(8000) NOT NULL,
                run_uuid VARCHAR(32) NOT NULL, PRIMARY KEY ("key", run_uuid));
            INSERT INTO experiments VALUES (1, 'exp');""")
        for number, (name, rows) in enumerate(runs.items()):
            store.execute("INSERT INTO runs VALUES (?, ?, ?, 'active', 1)", (str(number), name, status))
            for key, value in params.items():
                store.execute("INSERT INTO params VALUES (?, ?, ?)", (key, value, str(number)))
            for step, row in rows:
                for metric, value in row.items():
                    kept = (
                        0.0 if math.isnan(value) else max(min(value, 1.7976931348623157e308), -1.7976931348623157e308)
                    )
                    store.execute(
                        "INSERT INTO metrics VALUES (?, ?, 0, ?, ?, ?)",
                        (metric, kept, str(number), step, math.isnan(value)),
                    )
        store.commit()


# -- trackio --------------------------------------------------------------------------------------------------------


def write_trackio(file: Path, runs: Mapping[str, Rows], config: Mapping[str, Any]) -> None:
    """A project of trackio's."""
    with contextlib.closing(sqlite3.connect(file)) as store:
        store.executescript("""
            CREATE TABLE metrics (id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL, timestamp TEXT NOT NULL,
                run_name TEXT NOT NULL, step INTEGER NOT NULL, metrics TEXT NOT NULL);
            CREATE TABLE system_metrics (id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL);
            CREATE TABLE configs (id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL, run_name TEXT NOT NULL,
                config TEXT NOT NULL, created_at TEXT NOT NULL, UNIQUE(run_id));""")
        for name, rows in runs.items():
            for step, row in rows:
                said = {k: json.dumps(v) if not math.isfinite(v) else v for k, v in row.items()}
                store.execute(
                    "INSERT INTO metrics (run_id, timestamp, run_name, step, metrics) VALUES (?, '', ?, ?, ?)",
                    (f"id-{name}", name, step, json.dumps(said).encode()),
                )
            store.execute(
                "INSERT INTO configs (run_id, run_name, config, created_at) VALUES (?, ?, ?, '')",
                (f"id-{name}", name, json.dumps({**config, "_Group": "g"}).encode()),
            )
        store.commit()
