"""Tables of runs: csv, tsv, jsonl and parquet, in long, tidy or wide form.

pyarrow reads them where it is installed: ten million rows take seconds. Without it Python's own modules read all but
parquet, to the same numbers. A missing value is no point of a curve; `nan` and `inf` are points without a number.
"""

from __future__ import annotations

import contextlib
import csv
import io
import re
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gptlab import files
from gptlab.errors import DataError, UserError
from gptlab.logs.naming import SEEDS, arm_and_seed, is_metric, plain
from gptlab.logs.run import Array, Curve, How, LogRun, Unclear, curve

ENDINGS = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
ARMS = (
    *("configuration", "config", "method", "optimizer", "optim", "model", "variant", "experiment", "condition"),
    *("algorithm", "algo", "recipe", "treatment"),
)
NAMES = ("run_name", "name", "run", "run_id", "id")  # where they are texts
COUNTS = ("run", "replicate", "rep", "trial", "repeat", "repetition", "run_id", "run_number")  # they only count runs
STEPS = (
    *("step", "steps", "global_step", "train_global_step", "trainer_global_step", "iter", "iteration", "iterations"),
    *("iter_num", "update", "updates", "_step", "epoch", "epochs"),
)
KEYS, VALUES = ("metric", "metric_name", "key", "tag"), ("value", "val", "metric_value")  # of the tidy form
HYPERS = re.compile(  # settings that are numbers
    r"(.*_)?(lr|learning_rate|wd|weight_decay|batch_size|dropout|momentum|beta_?[12]|warmup(_steps|_iters)?"
    r"|n_(layer|head|embd)|num_(layers|heads)|depth|width|d_model|hidden_size)"
)
NO_ARMS = re.compile(  # texts that tell no arms apart
    r"split|phase|stage|mode|event|type|(data)?set|date|time(stamp)?|created|host(name)?|device|user|notes?|comments?|tags?"
    r"|state|status"
)
INDEX = re.compile(r"|unnamed: \d+|__index_level_\d+__|_timestamp|_runtime|_wandb.*")  # no metrics
NAN = re.compile(r"\s*[+-]?nan\s*", re.IGNORECASE)
EMPTY = ("", "null", "NULL", "None", "NA", "N/A")
ENDED = {"failed": "failed", "diverged": "diverged", **dict.fromkeys(("crashed", "killed", "running"), "unfinished")}
MOST_RUNS = 10_000  # of a table with more rows a run has several
SAMPLE = 2**20  # bytes that tell which columns are numbers

Codes = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass
class Table:
    """Columns of numbers, and columns of texts as codes into their distinct texts."""

    path: Path
    form: str
    names: list[str] = field(default_factory=list)
    numbers: dict[str, tuple[Array, Mask | None]] = field(default_factory=dict)
    """Values, and where there is one; None: everywhere."""
    texts: dict[str, tuple[Codes, list[str]]] = field(default_factory=dict)
    """Code -1 is no text."""
    remarks: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return next((len(column[0]) for columns in (self.numbers, self.texts) for column in columns.values()), 0)

    def add_as_numbers(self, name: str, codes: Codes, labels: Sequence[str], comma: bool = False) -> None:
        """Add a column of texts as numbers, and say what is none."""
        values = np.array([*(_number(label, comma) for label in labels), np.nan])
        there, odd, example = codes >= 0, 0, ""
        for i, label in enumerate(labels):
            if np.isnan(values[i]) and not NAN.fullmatch(label):
                these = codes == i
                there &= ~these
                if label.strip() not in EMPTY:
                    odd, example = odd + int(these.sum()), example or label
        if odd:
            shown = repr(files.printable(example)[:40])
            self.remarks.append(f"{self.path}: {odd} values of {name} are no numbers, such as {shown}: left out")
        self.numbers[name] = values[codes], None if there.all() else there

    def as_text(self, name: str) -> tuple[Codes, list[str]]:
        """A column as texts, also one of numbers."""
        if name in self.texts:
            return self.texts[name]
        values, there = self.numbers[name]
        distinct, inverse = np.unique(values, return_inverse=True)
        codes: Codes = inverse.astype(np.int32)
        codes[np.isnan(values) if there is None else ~there | np.isnan(values)] = -1
        return codes, [str(int(value)) if value.is_integer() else repr(value) for value in distinct.tolist()]

    def called(self, *among: str) -> list[str]:
        """The columns with one of these plain names, in the order of the names."""
        return [name for wanted in among for name in self.names if plain(name) == wanted]


def _number(text: str, comma: bool = False) -> float:
    """A text as a number, NaN if it is none; `71.5%` is 71.5."""
    try:
        return float((text.replace(",", ".") if comma else text).strip().removesuffix("%"))
    except ValueError:
        return np.nan


def form_of(path: Path) -> str:
    """csv, jsonl or parquet by the file's name, packed or not; else ""."""
    return ENDINGS.get(Path(re.sub(r"\.(gz|zst|bz2|xz)$", "", path.name.lower())).suffix, "")


def is_mine(path: Path) -> bool:
    return form_of(path) != "" and path.is_file()


def read(path: Path, how: How) -> list[LogRun]:
    """The runs of a table.

    Raises:
        DataError: the file cannot be read.
        Unclear: the caller must say which column is which.
    """
    return read_table(load(path, how), how)


def read_table(table: Table, how: How) -> list[LogRun]:
    """The runs in columns. Raises as `read`."""
    runs = _wide(table, how) or _long(table, how)
    runs[0].remarks = table.remarks
    return runs


# -- loading --------------------------------------------------------------------------------------------------------


def load(path: Path, how: How, null_is_nan: bool = False) -> Table:
    """All columns of a file. Raises DataError for a file that cannot be read.

    Args:
        null_is_nan: a null of JSON is a number that was not finite; else it is a missing value.
    """
    table = Table(path, form_of(path))
    try:
        with _opened(path) as file:
            files.refuse_pointer(path, file.peek(64)[:64] if isinstance(file, io.BufferedReader) else b"", DataError)
        if table.form == "parquet":
            _load_parquet(table)
        elif table.form == "jsonl":
            _load_jsonl(table, null_is_nan)
        else:
            _load_csv(table, how)
    except UserError:
        raise
    except UnicodeDecodeError:
        raise DataError(f"{path} is damaged: it is not UTF-8 text; save it as UTF-8") from None
    except (OSError, ValueError, csv.Error) as fault:  # arrow's errors are such
        raise DataError(f"{path} cannot be read: {files.because(fault)}") from None
    if not table.rows:
        raise DataError(f"{path} holds no rows")
    for name in table.names:
        if (line := " ".join(name.split())) != name and line not in table.names:  # a name is said in one line
            table.names[table.names.index(name)] = line
            if name in table.numbers:
                table.numbers[line] = table.numbers.pop(name)
            if name in table.texts:
                table.texts[line] = table.texts.pop(name)
    return table


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with files.open_regular(path) as raw, files.unpacked(raw) as file:
        yield file


def _load_csv(table: Table, how: How) -> None:
    with _opened(table.path) as file:
        head = file.read(SAMPLE)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{table.path} is UTF-16 text; save it as UTF-8")
    text = (head if len(head) < SAMPLE else head[: head.rfind(b"\n") + 1]).decode("utf-8-sig")
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = "\t" if "\t" in first else max(",;", key=first.count)
    sample = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    if len(sample) < 2:
        raise DataError(f"{table.path} holds no rows")
    names, rows = sample[0], [row for row in sample[1:] if len(row) == len(sample[0])]
    table.names = [name.strip() for name in names]
    if first.startswith("#") or not any(np.isnan(_number(name)) for name in names):
        what = "a comment" if first.startswith("#") else "numbers"
        raise DataError(f"{table.path} begins with {what}: its first row must name the columns")
    if twice := sorted({name for name in table.names if table.names.count(name) > 1}):
        raise DataError(f"{table.path} has the column {', '.join(map(repr, twice))} twice: rename one of them")
    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    comma = _has_comma(columns, delimiter)
    texts = {how.arm, how.seed, *table.called("arm", *ARMS, *NAMES, *SEEDS, *COUNTS, *KEYS)}

    def is_number(cell: str) -> bool:
        return NAN.fullmatch(cell) is not None or not np.isnan(_number(cell, comma))

    def is_numeric(name: str, cells: Sequence[str]) -> bool:
        filled = [cell for cell in cells if cell.strip() not in EMPTY]
        return name not in texts and 2 * sum(map(is_number, filled)) >= len(filled)

    numeric = {name for name, cells in zip(table.names, columns, strict=True) if is_numeric(name, cells)}
    if _arrow() is not None:
        _csv_by_arrow(table, names, delimiter, comma, numeric, newlines=b'"' in head)
    else:
        _csv_by_python(table, delimiter, comma, numeric)


def _has_comma(columns: Sequence[Sequence[str]], delimiter: str) -> bool:
    """Whether numbers have a decimal comma. With tabs between them `1,000` alone may be a thousand."""
    if delimiter == ",":
        return False
    cells = {cell.strip() for column in columns for cell in column}
    if delimiter == "\t" and any(re.fullmatch(r"[+-]?\d*\.\d+", cell) for cell in cells):
        return False
    numbers = [cell for cell in cells if re.fullmatch(r"[+-]?\d+,\d+", cell)]
    return any(delimiter == ";" or len(cell.rpartition(",")[2]) != 3 for cell in numbers)


def _arrow() -> ModuleType | None:
    try:
        import pyarrow
    except ImportError:
        return None
    return pyarrow


def _csv_by_arrow(
    table: Table, raw_names: list[str], delimiter: str, comma: bool, numeric: set[str], newlines: bool
) -> None:
    import pyarrow
    from pyarrow import csv as arrow_csv

    text, number = pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), pyarrow.float64()
    kinds = {raw: number if name in numeric else text for raw, name in zip(raw_names, table.names, strict=True)}
    skipped: list[int] = []

    def skip(row: Any) -> str:
        skipped.append(1)
        return "skip"

    while True:
        try:
            with _opened(table.path) as file:
                found = arrow_csv.read_csv(
                    file,
                    arrow_csv.ReadOptions(block_size=2**23),
                    arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=newlines, invalid_row_handler=skip),
                    arrow_csv.ConvertOptions(
                        column_types=kinds,
                        null_values=EMPTY,
                        strings_can_be_null=True,
                        decimal_point="," if comma else ".",
                    ),
                )
            break
        except pyarrow.ArrowInvalid as error:  # a text among numbers
            place = re.search(r"In CSV column #(\d+): .*invalid value", str(error), re.DOTALL)
            if place is None or kinds[raw_names[int(place[1])]] == text:
                raise
            kinds[raw_names[int(place[1])]] = text
            skipped.clear()
    columns = dict(zip(table.names, found.columns, strict=True))
    del found
    _from_arrow(table, columns, numeric, comma)
    _say_skipped(table, len(skipped))


def _say_skipped(table: Table, count: int) -> None:
    if count:
        rows = f"{count} row{'s' * (count > 1)}"
        table.remarks.append(f"{table.path}: {rows} with another number of values than its first row left out")


def _from_arrow(table: Table, columns: dict[str, Any], numeric: Collection[str] = (), comma: bool = False) -> None:
    """Move columns of arrow into the table. `numeric`: those that are numbers, whatever their type."""
    import pyarrow

    kinds = pyarrow.types
    for name in list(columns):
        column = columns.pop(name)  # there is no memory for all of them twice
        of = column.type
        if kinds.is_dictionary(of) and kinds.is_string(of.value_type):
            pass
        elif kinds.is_integer(of) or kinds.is_floating(of) or kinds.is_decimal(of) or kinds.is_null(of):
            there = None if not column.null_count else column.is_valid().to_numpy()
            values = column.cast(pyarrow.float64(), safe=False).to_numpy()
            table.numbers[name] = np.asarray(values, dtype=np.float64), there
            continue
        elif kinds.is_list(of) or kinds.is_large_list(of) or kinds.is_map(of) or kinds.is_boolean(of):
            continue
        else:
            column = column.cast(pyarrow.string()).dictionary_encode()
        column = column.unify_dictionaries().combine_chunks()
        if isinstance(column, pyarrow.ChunkedArray):
            column = pyarrow.concat_arrays(column.chunks)
        codes = column.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
        labels = column.dictionary.to_pylist()
        if name in numeric:
            table.add_as_numbers(name, codes, labels, comma)
        else:
            table.texts[name] = codes, labels


def _csv_by_python(table: Table, delimiter: str, comma: bool, numeric: set[str]) -> None:
    values = {name: array("d") for name in table.names if name in numeric}
    known = {name: dict[str, int]() for name in table.names}
    codes = {name: array("i") for name in table.names}  # of texts, and of what is no number
    skipped = 0
    with _opened(table.path) as file:
        rows = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter)
        header = False
        for row in rows:
            if not row:
                continue
            if not header:
                header = True
                continue
            if len(row) != len(table.names):
                skipped += 1
                continue
            for name, cell in zip(table.names, row, strict=True):
                code = -1
                if name in values:
                    try:
                        values[name].append(float(cell.replace(",", ".") if comma else cell))
                    except ValueError:
                        values[name].append(np.nan)
                        code = known[name].setdefault(cell, len(known[name]))
                elif cell not in EMPTY:
                    code = known[name].setdefault(cell, len(known[name]))
                codes[name].append(code)
    for name in table.names:
        labels, at = list(known[name]), np.array(codes[name], dtype=np.int32)
        if name not in values:
            table.texts[name] = at, labels
            continue
        column = np.array(values[name])
        table.numbers[name] = column, None
        if labels:
            table.add_as_numbers(name, at, labels, comma)  # says what is none
            added, there = table.numbers[name]
            there = (at < 0) | (at >= 0 if there is None else there)
            table.numbers[name] = np.where(at < 0, column, added), there
    _say_skipped(table, skipped)


def _load_parquet(table: Table) -> None:
    try:
        from pyarrow import parquet, types
    except ImportError:
        raise DataError(f"{table.path}: parquet needs a package: pip install 'gptlab[data]'") from None
    texts = [field.name for field in parquet.read_schema(table.path) if types.is_string(field.type)]
    _take_arrow(table, [parquet.ParquetFile(table.path, read_dictionary=texts).read()])  # texts would take gigabytes


def _take_arrow(table: Table, whole: list[Any]) -> None:
    """Take a table whose columns may be objects with fields: `a` with the field `b` is `a.b`."""
    import pyarrow

    found = whole.pop()
    while any(pyarrow.types.is_struct(column.type) for column in found.columns):
        found = found.flatten()
    table.names = found.column_names
    columns = dict(zip(table.names, found.columns, strict=True))
    del found
    _from_arrow(table, columns)
    table.names = [name for name in table.names if name in table.numbers or name in table.texts]


def _load_jsonl(table: Table, null_is_nan: bool) -> None:
    if null_is_nan:
        with _opened(table.path) as file:
            null_is_nan = any(b"null" in block for block in iter(lambda: file.read(2**22), b""))
    if (arrow := _arrow()) is not None and not null_is_nan:
        from pyarrow import json as arrow_json

        try:
            with _opened(table.path) as file:
                whole = [arrow_json.read_json(file, arrow_json.ReadOptions(block_size=2**24))]
            _take_arrow(table, whole)
            return
        except arrow.ArrowInvalid:  # damaged lines, or values of several types
            table.numbers, table.texts = {}, {}
    with _opened(table.path) as file:
        rows, damaged = parse_lines(file)
    if damaged:
        table.remarks.append(damaged_lines(table.path, damaged))
    columns = columns_of(rows)
    table.names = list(columns)
    for name, (at, values) in columns.items():
        if any(isinstance(value, str) for value in values):
            labels: dict[str, int] = {}
            codes = np.full(len(rows), -1, dtype=np.int32)
            shown = (value if isinstance(value, str) else None if value is None else repr(value) for value in values)
            for i, label in zip(at, shown, strict=True):
                if label is not None:
                    codes[i] = labels.setdefault(label, len(labels))
            if all(isinstance(value, str) for value in values if value is not None):
                table.texts[name] = codes, list(labels)
            else:
                table.add_as_numbers(name, codes, list(labels))
            continue
        column, there = np.full(len(rows), np.nan), np.zeros(len(rows), dtype=np.bool_)
        column[at] = [np.nan if value is None else value for value in values]
        there[at] = [null_is_nan or value is not None for value in values]
        table.numbers[name] = column, None if there.all() else there


def parse_lines(file: IO[bytes]) -> tuple[list[dict[str, Any]], int]:
    """The objects in lines of JSON, and how many lines hold none."""
    rows, damaged = [], 0
    for line in file:
        if not line.strip():
            continue
        try:
            row = files.parse_json(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged


def damaged_lines(path: Path, count: int) -> str:
    return f"{path}: {count} damaged line{'s' * (count > 1)} left out"


def columns_of(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[list[int], list[Any]]]:
    """The numbers, texts and nulls under each name, with their rows; `a` with the field `b` is `a.b`."""
    columns: dict[str, tuple[list[int], list[Any]]] = {}

    def take(i: int, row: dict[str, Any], prefix: str) -> None:
        for name, value in row.items():
            if isinstance(value, dict):
                take(i, value, f"{prefix}{name}.")
            elif value is None or (isinstance(value, int | float | str) and not isinstance(value, bool)):
                at, values = columns.setdefault(prefix + name, ([], []))
                at.append(i)
                values.append(np.nan if isinstance(value, int) and abs(value) >= 2**1023 else value)  # beyond a float

    for i, row in enumerate(rows):
        take(i, row, "")
    return columns


# -- which column is which --------------------------------------------------------------------------------------------


@dataclass
class _Roles:
    """The columns that are no metrics; "": there is none."""

    arm: str = ""
    seed: str = ""
    count: bool = False
    """Whether the column of the seed only counts runs."""
    name: str = ""
    step: str = ""
    key: str = ""
    value: str = ""


def _said(table: Table, flag: str, name: str) -> str:
    if name and name not in table.names:
        columns = ", ".join(map(files.printable, table.names[:20]))
        raise Unclear(f"{table.path} has no column {name!r}, which --{flag} names; it has {columns}")
    if name and flag == "step" and name not in table.numbers:
        raise Unclear(f"{table.path}: the column {name!r}, which --step names, holds no numbers")
    return name


def _step(table: Table, how: How) -> str:
    return _said(table, "step", how.step) or next((n for n in table.called(*STEPS) if n in table.numbers), "")


def _roles(table: Table, how: How) -> _Roles:
    """Which column is which: as said, or guessed by its name, with a remark."""
    texts = table.texts
    roles = _Roles(_said(table, "arm", how.arm), _said(table, "seed", how.seed), step=_step(table, how))
    key = next((name for name in table.called(*KEYS) if name in texts), "")
    value = next((name for name in table.called(*VALUES) if name in table.numbers), "")
    if key and value:
        roles.key, roles.value = key, value
    if not roles.seed:
        is_number = {name: _seeds(table, name) is not None for name in table.called(*SEEDS, *COUNTS)}
        as_texts = [name for name in table.called(*SEEDS) if name in texts]
        roles.seed = next((name for name in table.called(*SEEDS, *COUNTS) if is_number[name]), "")
        roles.seed = roles.seed or next(iter(as_texts), "")
        roles.count = roles.seed != "" and plain(roles.seed) not in SEEDS
    taken = {roles.seed, roles.step, roles.key, roles.value, roles.arm}
    if not roles.arm and not how.arm_from:
        several = roles.seed != "" and len(table.as_text(roles.seed)[1]) > 1
        roles.arm = _arm_column(table, taken, several)
    taken.add(roles.arm)
    roles.name = next((name for name in table.called(*NAMES) if name in texts and name not in taken), "")
    guessed = [
        f"{name} names the {what}s"
        for what, name, said in (("arm", roles.arm, how.arm), ("step", roles.step, how.step))
        if name and not said and plain(name) != what
    ]
    if roles.count and not how.seed:
        guessed.append(f"{roles.seed} numbers the runs, which is no seed to pair by (--seed {roles.seed} if it is)")
    elif roles.seed and not how.seed and plain(roles.seed) != "seed":
        guessed.append(f"{roles.seed} is the seed")
    if roles.name and not roles.arm:
        guessed.append(f"{roles.name} names the runs")
    if guessed:
        table.remarks.append(f"{table.path}: {', '.join(guessed)}")
    return roles


def _arm_column(table: Table, taken: set[str], several: bool) -> str:
    """The column that names the arms, by its name, or as the only one of texts; "" if there is none.

    Args:
        several: there are several runs for certain; else a column with one text may be the setting of a single run.
    """
    rest = [name for name, (_, labels) in table.texts.items() if len(labels) < table.rows and plain(name) not in NAMES]
    rest = [name for name in rest if not NO_ARMS.fullmatch(plain(name))]
    for among, alone in ((table.called("arm"), True), (table.called(*ARMS), several), (rest, False)):
        codes = {name: table.as_text(name) for name in among if name not in taken}
        fits = [name for name in codes if len(codes[name][1]) > 1] or (list(codes)[:1] if alone else [])
        fits = [name for i, name in enumerate(fits) if not any(_same(codes[name], codes[o]) for o in fits[:i])]
        if len(fits) > 1:
            columns = " or ".join(map(files.printable, fits))
            raise Unclear(f"{table.path}: {columns} may name the arms; --arm {files.printable(fits[0])} chooses")
        if fits:
            return fits[0]
    return ""


def _same(one: tuple[Codes, list[str]], two: tuple[Codes, list[str]]) -> bool:
    """Whether two columns tell the same rows apart."""
    pairs = len(np.unique(one[0].astype(np.int64) << 32 | (two[0] + 1)))
    return pairs == len(np.unique(one[0])) == len(np.unique(two[0]))


def _seeds(table: Table, name: str) -> list[int] | None:
    """The number in each distinct text of a column; None if one has none, or two have the same."""
    labels = table.as_text(name)[1]
    found = [re.fullmatch(r"[^\d.]*?(\d{1,18})(?:\.0)?", label.strip()) for label in labels]
    seeds = [int(match[1]) for match in found if match]
    return seeds if len(seeds) == len(labels) == len(set(seeds)) else None


# -- runs -----------------------------------------------------------------------------------------------------------


def _wide(table: Table, how: How) -> list[LogRun]:
    """The runs of a table with a column for each of them, as W&B exports it; [] of another table."""
    named, first = _step(table, how), table.names[0]
    step = named or (first if first in table.numbers and " - " not in first else "")
    columns: dict[str, tuple[str, str]] = {}  # column: run, metric
    others = [name for name in table.numbers if name != step and not INDEX.fullmatch(plain(name))]
    if others and all(" - " in name for name in others):
        for name in others:
            run_name, _, metric = name.rpartition(" - ")
            if not (name.endswith(("__MIN", "__MAX")) or plain(metric) in STEPS or INDEX.fullmatch(plain(metric))):
                columns[name] = run_name, metric
    elif named and others and not (table.texts or how.arm or how.seed) and all(map(_is_run, others)):
        stem = Path(table.path.name).stem
        metric = how.metric or (stem if is_metric(stem) else "value")
        columns = {name: (name, metric) for name in others}
    if not columns:
        return []
    if not step:
        raise Unclear(f"{table.path} has columns such as {others[0]!r} and none of the step; --step names it")
    by_run: dict[str, LogRun] = {}
    for name, (run_name, metric) in columns.items():
        run = by_run.setdefault(run_name, LogRun(table.path, table.form, {}, name=run_name))
        points, _, _ = _points(table, step, name, slice(None))
        if len(points[0]):
            run.curves[metric] = points
    metrics = ", ".join(dict.fromkeys(metric for _, metric in columns.values()))
    example = files.printable(next(iter(columns)))
    table.remarks.append(f"{table.path}: each column is a run's {metrics}, such as {example!r}")
    return list(by_run.values())


def _is_run(name: str) -> bool:
    return arm_and_seed(name.split("/")) is not None


def _points(table: Table, step: str, name: str, rows: Any, lone: bool = False) -> tuple[Curve, int, int]:
    """A metric's curve in some rows, how many rows have a step again, and how many of these another value.

    Args:
        lone: an empty value is NaN.
    """
    steps, values = table.numbers[step][0][rows], table.numbers[name][0][rows]
    there = table.numbers[name][1]
    if there is not None and not lone:
        there = there[rows]
        steps, values = steps[there], values[there]
    values = np.where(np.isfinite(values), values, np.nan) if np.isinf(values).any() else values
    points = curve(steps, values)
    repeated = int(np.isfinite(steps).sum()) - len(points[0])
    if not repeated:
        return points, 0, 0
    kept = points[1][np.searchsorted(points[0], steps[np.isfinite(steps)])]
    return points, repeated, int((~np.isclose(kept, values[np.isfinite(steps)], 0, 0, equal_nan=True)).sum())


def _long(table: Table, how: How) -> list[LogRun]:
    """The runs of a table with a row for each run and step, or for each run."""
    roles = _roles(table, how)
    taken = {roles.arm, roles.seed, roles.name, roles.step, roles.key, roles.value}
    metrics = [name for name in table.numbers if name not in taken and not INDEX.fullmatch(plain(name))]
    if roles.key:
        metrics = [roles.value]
    if not metrics:
        rest = [(name, labels) for name, (_, labels) in table.texts.items() if name not in taken and labels]
        says = f"{table.path} has no column of numbers that could be a metric"
        if rest:
            name, (example, *_) = rest[0]
            says += f": {files.printable(name)} holds texts such as {files.printable(example)[:40]!r}"
        raise DataError(says)
    single = {name: labels[0] for name, (_, labels) in table.texts.items() if len(labels) == 1 and name not in taken}
    columns = [name for name in (roles.arm, roles.seed, roles.name, roles.key) if name]
    texts = {name: table.as_text(name) for name in columns}
    settings = [] if roles.arm or how.arm_from else _settings(table, taken, [texts[name][0] for name in columns])
    texts |= {name: table.as_text(name) for name in settings}
    columns += settings
    metrics = [name for name in metrics if name not in settings]
    if roles.arm:
        texts[roles.arm] = _same_numbers(*texts[roles.arm])
    seeds = _seeds(table, roles.seed) if roles.seed else None
    if seeds is None and plain(roles.seed) in SEEDS:
        texts_of_seeds = texts[roles.seed][1]
        seeds = [sorted(texts_of_seeds).index(label) for label in texts_of_seeds]
        shown = ", ".join(f"{files.printable(label)[:20]} is {i}" for i, label in enumerate(sorted(texts_of_seeds)[:3]))
        table.remarks.append(f"{table.path}: {roles.seed} holds texts, numbered in their order: {shown}")
    lone = len(metrics) == 1 and table.form != "jsonl"
    if roles.step and (there := table.numbers[roles.step][1]) is not None:
        table.remarks.append(f"{table.path}: {int((~there).sum())} rows without {roles.step} left out")

    by_run: dict[tuple[str, ...], LogRun] = {}
    again: dict[str, int] = {}
    for rows, key in _groups(table.rows, [texts[name][0] for name in columns]):
        labels = {name: texts[name][1][code] if code >= 0 else "" for name, code in zip(columns, key, strict=True)}
        metric_key = labels.pop(roles.key, "")
        run = by_run.get(tuple(labels.values()))
        if run is None:
            run = by_run[tuple(labels.values())] = LogRun(table.path, table.form, {}, labels.get(roles.arm) or None)
            run.name = labels.get(roles.name, "")
            if seeds is not None and (label := labels[roles.seed]):
                run.seed, run.counted = seeds[texts[roles.seed][1].index(label)], roles.count
            elif roles.seed:
                run.name = labels[roles.seed]
            run.status, run.settings = _status(table, rows), single | {name: labels[name] for name in settings}
        if not roles.step:
            _take_row(table, run, {metric_key or name: name for name in metrics}, rows, metric_key)
            continue
        for name in metrics:
            called = metric_key or name
            points, repeated, changed = _points(table, roles.step, name, rows, lone)
            if len(points[0]):
                run.curves[called] = points
            if 2 * repeated > len(points[0]):
                _refuse_repeated(table, roles, run, repeated)
            if changed:  # a line of training and one of evaluation may say the same of a step
                again[called] = again.get(called, 0) + changed
    for name, count in again.items():
        table.remarks.append(f"{table.path}: {count} steps have {name} twice in a run; the later row counts")
    return list(by_run.values())


def _settings(table: Table, taken: set[str], codes: Sequence[Codes]) -> list[str]:
    """The settings that are numbers and differ, in a table with a row for each run.

    Args:
        codes: of what else tells runs apart. Where a run has several rows, such a column may be a schedule.
    """
    if table.rows > MOST_RUNS:
        return []
    found = [name for name in table.numbers if name not in taken and HYPERS.fullmatch(plain(name))]
    found = [name for name in found if 1 < len(table.as_text(name)[1]) < table.rows]
    all_codes = [*codes, *(table.as_text(name)[0] for name in found)]
    return found if found and sum(1 for _ in _groups(table.rows, all_codes)) == table.rows else []


def _same_numbers(codes: Codes, labels: list[str]) -> tuple[Codes, list[str]]:
    """Arms that are one number written in two ways, as 0.001 and 1e-3, under the first of the texts."""
    numbers = [_number(label) for label in labels]
    if any(map(np.isnan, numbers)):
        return codes, labels
    first = np.array([*(numbers.index(number) for number in numbers), -1], dtype=np.int32)
    return first[codes], labels


def _groups(rows: int, codes: Sequence[Codes]) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """The rows of each combination of codes, as a slice where they are together, in the order of the table."""
    if not codes:
        yield slice(None), ()
        return
    together = np.zeros(rows, dtype=np.int64)
    for some in codes:
        together *= int(some.max()) + 2
        together += some + 1
    starts = np.flatnonzero(np.diff(together, prepend=-1))
    if len(np.unique(together[starts])) == len(starts):
        for begin, end in zip(starts, np.append(starts[1:], rows), strict=True):
            yield slice(begin, end), tuple(int(some[begin]) for some in codes)
        return
    order = np.argsort(together, kind="stable")
    starts = np.flatnonzero(np.diff(together[order], prepend=-1))
    parts = [order[a:b] for a, b in zip(starts, np.append(starts[1:], rows), strict=True)]
    for part in sorted(parts, key=lambda part: part[0]):
        yield part, tuple(int(some[part[0]]) for some in codes)


def _status(table: Table, rows: Any) -> str:
    """How a run ended, by the last row of a column `state` or `status`."""
    for name in table.called("state", "status"):
        if name in table.texts:
            codes, labels = table.texts[name]
            code = codes[rows][-1]
            return ENDED.get(labels[code].lower(), "completed") if code >= 0 else "completed"
    return "completed"


def _take_row(table: Table, run: LogRun, metrics: dict[str, str], rows: Any, key: str) -> None:
    """The numbers of a run that has one row."""
    at = np.arange(table.rows)[rows]
    if len(at) > 1:
        where = run.arm or run.name or "the table"
        where += "" if run.seed is None else f" seed {run.seed}"
        columns = ", ".join(map(files.printable, table.names[:20]))
        raise Unclear(
            f"{table.path}: {len(at)} rows are of {where}, and nothing "
            f"tells them apart: --arm, --seed or --step names the column that does; there are {columns}"
        )
    for metric, name in metrics.items():
        values, there = table.numbers[name]
        if there is None or there[at[0]]:
            value = float(values[at[0]])
            run.result[metric] = value if np.isfinite(value) else np.nan


def _refuse_repeated(table: Table, roles: _Roles, run: LogRun, repeated: int) -> None:
    which = " ".join(filter(None, (run.arm, run.name, "" if run.seed is None else f"seed {run.seed}"))) or "all rows"
    used = {roles.arm, roles.seed, roles.name, roles.step, roles.key, roles.value}
    others = [name for name in table.names if not (name in used or is_metric(name) or INDEX.fullmatch(plain(name)))]
    raise Unclear(
        f"{table.path}: {repeated} steps of {which} are there again, so these are several runs: --arm or --seed names "
        f"the column that tells them apart{', such as ' * bool(others)}{', '.join(map(files.printable, others[:9]))}"
    )
