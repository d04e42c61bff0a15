"""Tables with a row per slide (CSV, TSV, Parquet) -> targets of slides, patients and splits.

An unknown cell is an unknown target. A cell that should be a label or a number and is none is an error with its row.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from wsi_mmm.errors import ConfigError, ManifestError
from wsi_mmm.storage import store
from wsi_mmm.tasks.targets import Survival, Target
from wsi_mmm.types import I32

UNKNOWN = frozenset(("", "na", "n/a", "nan", "null", "none", "unknown", "?"))
"""Cells, in any case, that say that nothing is known."""

YES, NO = frozenset(("1", "true", "yes", "y", "event")), frozenset(("0", "false", "no", "n", "censored"))
MAX_CELLS, MAX_TEXT = 20_000_000, 1 << 30
"""Cells and bytes of a Parquet table of slides above which it is refused."""


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text without blanks around them, by column; ``name`` is what errors call the file."""

    name: str
    columns: Mapping[str, tuple[str, ...]]

    def column(self, name: str) -> tuple[str, ...]:
        """The cells of a column. ManifestError naming those that there are."""
        if name not in self.columns:
            raise ManifestError(f"{self.name} has no column {name!r}; it has {', '.join(self.columns)}")
        return self.columns[name]

    def wrong(self, row: int, text: str) -> ManifestError:
        """An error about a row (counted from 0 here; a user counts the header as row 1)."""
        return ManifestError(f"{self.name} row {row + 2}: {text}")


def read_table(uri: str) -> Table:
    """The table at a path or URI: Parquet by its bytes, else text with a header line, separated by tabs where the file
    is called .tsv and by commas elsewhere. Raises ManifestError, NotFound, StorageError."""
    name, data = store.redact(uri), store.read_bytes(uri)
    separator = "\t" if uri.partition("?")[0].lower().endswith(".tsv") else ","
    return Table(name, _parse_parquet(data, name) if data[:4] == b"PAR1" else _parse_csv(data, name, separator))


def _parse_csv(data: bytes, name: str, separator: str) -> dict[str, tuple[str, ...]]:
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), delimiter=separator, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{name} is no table ({error}): save it as CSV in UTF-8, or as Parquet") from error
    if not rows or not any(cell.strip() for cell in rows[0]):
        raise ManifestError(f"{name} has no header line: name the columns in its first line")
    header = [cell.strip() for cell in rows[0]]
    double = next((cell for cell in header if header.count(cell) > 1), None)
    if double is not None:
        raise ManifestError(f"{name} has two columns {double!r}: rename one")
    while len(rows) > 1 and not any(rows[-1]):
        rows.pop()  # blank lines at the end
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise ManifestError(f"{name} row {number}: {len(row)} cells, but {len(header)} columns: correct the row")
    return {key: tuple(row[n].strip() for row in rows[1:]) for n, key in enumerate(header)}


def _parse_parquet(data: bytes, name: str) -> dict[str, tuple[str, ...]]:
    try:
        schema = pq.ParquetFile(io.BytesIO(data)).schema_arrow
        file = pq.ParquetFile(
            io.BytesIO(data), read_dictionary=[one.name for one in schema if pa.types.is_string(one.type)]
        )
        cells = file.metadata.num_rows * max(1, file.metadata.num_columns)
        if cells > MAX_CELLS:
            raise ManifestError(f"{name} has {cells:,} cells, more than {MAX_CELLS:,}: leave out columns or rows")
        table = pa.Table.from_batches(_iter_rows(file, name), file.schema_arrow)
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"{name} is no Parquet file that can be read ({error}): write it again") from error
    return {key: tuple(_cell_text(value) for value in table[key].to_pylist()) for key in table.column_names}


def _iter_rows(file: pq.ParquetFile, name: str) -> Iterator[pa.RecordBatch]:
    """The rows a few at a time: a value that repeats takes no room in the file, but each time in memory."""
    size = 0
    for batch in file.iter_batches(batch_size=1024):
        size += sum(_column_bytes(column) for column in batch.columns)
        if size > MAX_TEXT:
            raise ManifestError(f"{name} holds more than {MAX_TEXT >> 20} MiB: leave out columns or rows")
        yield batch


def _column_bytes(column: pa.Array) -> int:
    """Bytes of all values, each counted as often as it stands there."""
    if isinstance(column, pa.DictionaryArray) and pa.types.is_string(column.dictionary.type):
        lengths = pc.binary_length(column.dictionary).take(column.indices)
        return int(pc.sum(lengths).as_py() or 0)
    return int(column.nbytes)


def _cell_text(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    # Integers with gaps are stored as floats: a class "1" must not become "1.0".
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


# ---------------------------------------------------------------- target


@dataclass(frozen=True, slots=True)
class TableTask:
    """The ``columns`` that hold the targets of a task of ``kind``.

    classify: one column that holds one of ``labels``. multilabel: one column per label (yes or no), or one column of
    labels joined by ``separator``. regress: a column per value. survive: the time, then whether the event happened.
    ``values`` translates cells to labels before anything else.
    """

    task: str
    kind: str
    columns: tuple[str, ...]
    labels: tuple[str, ...] = ()
    values: Mapping[str, str] = field(default_factory=dict)
    separator: str = ";"

    def __post_init__(self) -> None:
        allowed = {"classify": (1,), "multilabel": (1, len(self.labels)), "survive": (2,)}
        if self.kind not in KINDS:
            raise ConfigError(f"task '{self.task}' of kind {self.kind!r} learns from no table: give {', '.join(KINDS)}")
        counts = allowed.get(self.kind, (max(1, len(self.columns)),))
        if len(self.columns) not in counts:
            raise ConfigError(f"task '{self.task}': {len(self.columns)} columns, {self.kind} takes {counts[-1]}")
        if self.kind in ("classify", "multilabel") and not self.labels:
            raise ConfigError(f"task '{self.task}': no labels: list the classes that its columns hold")


@dataclass(frozen=True, slots=True)
class SlideTable:
    """Per row: the slide's id, its patient (the slide itself where none is given), its split ("": none given), and the
    targets by task. ``table``: where further columns are found."""

    slides: tuple[str, ...]
    groups: tuple[str, ...]
    splits: tuple[str, ...]
    targets: Mapping[str, tuple[Target, ...]]
    table: Table

    def of(self, row: int) -> dict[str, Target]:
        """All targets of a row."""
        return {task: targets[row] for task, targets in self.targets.items()}


def slide_table(
    table: Table,
    tasks: Sequence[TableTask],
    *,
    slide: str = "slide",
    group: str | None = None,
    split: str | None = None,
) -> SlideTable:
    """Parse the rows. Raises ManifestError with the row for a slide without name or listed twice, a label that the
    task does not have, a number that is none, a negative time."""
    slides = table.column(slide)
    seen: dict[str, int] = {}
    for row, name in enumerate(slides):
        if not name:
            raise table.wrong(row, f"no slide in column {slide!r}: name it, or remove the row")
        if name in seen:
            raise table.wrong(row, f"slide {name!r} is already in row {seen[name] + 2}: keep one of them")
        seen[name] = row
    groups = table.column(group) if group else slides
    for row, name in enumerate(groups):
        if name.lower() in UNKNOWN:
            raise table.wrong(row, f"no patient in column {group!r}: give one, so that splits do not divide it")
    splits = table.column(split) if split else ("",) * len(slides)
    return SlideTable(slides, groups, splits, {task.task: _column_targets(table, task) for task in tasks}, table)


def _column_targets(table: Table, task: TableTask) -> tuple[Target, ...]:
    rows = zip(*(table.column(name) for name in task.columns), strict=True)
    return tuple(_READERS[task.kind](table, task, row, cells) for row, cells in enumerate(rows))


def _class_target(table: Table, task: TableTask, row: int, cells: tuple[str, ...]) -> int:
    cell = task.values.get(cells[0], cells[0])
    if cell in task.labels:
        return task.labels.index(cell)
    if cell.lower() in UNKNOWN:
        return -1
    known = ", ".join(task.labels)
    raise table.wrong(row, f"column {task.columns[0]!r} holds {cell!r}, which is none of {known}: correct or map it")


def _label_targets(table: Table, task: TableTask, row: int, cells: tuple[str, ...]) -> Target:
    if len(task.columns) == len(task.labels) and (len(cells) > 1 or cells[0].lower() in YES | NO | UNKNOWN):
        return np.array([_parse_flag(table, row, *pair) for pair in zip(task.columns, cells, strict=True)], np.float32)
    if cells[0].lower() in UNKNOWN - {"none"}:
        return np.full(len(task.labels), np.nan, np.float32)
    target = np.zeros(len(task.labels), np.float32)
    for cell in cells[0].split(task.separator):
        if cell.strip() and cell.strip().lower() != "none":
            target[_class_target(table, task, row, (cell.strip(),))] = 1
    return target


def _parse_flag(table: Table, row: int, column: str, cell: str) -> float:
    if cell.lower() in UNKNOWN:
        return math.nan
    if cell.lower() in YES | NO:
        return float(cell.lower() in YES)
    raise table.wrong(
        row, f"column {column!r} holds {cell!r}, which is neither yes nor no: give 1 or 0, or leave it empty"
    )


def _value_targets(table: Table, task: TableTask, row: int, cells: tuple[str, ...]) -> Target:
    return np.array([_parse_float(table, row, *pair) for pair in zip(task.columns, cells, strict=True)], np.float32)


def _parse_float(table: Table, row: int, column: str, cell: str) -> float:
    if cell.lower() in UNKNOWN:
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        value = math.inf
    if not math.isfinite(value):
        raise table.wrong(row, f"column {column!r} holds {cell!r}, which is no number: correct it, or leave it empty")
    return value


def _survival_target(table: Table, task: TableTask, row: int, cells: tuple[str, ...]) -> Survival:
    time = _parse_float(table, row, task.columns[0], cells[0])
    event = _parse_flag(table, row, task.columns[1], cells[1])
    if time < 0:
        raise table.wrong(row, f"column {task.columns[0]!r} holds the time {cells[0]}: give 0 or more")
    known = not (math.isnan(time) or math.isnan(event))
    return Survival(time if known else math.nan, bool(known and event))


_READERS: dict[str, Callable[[Table, TableTask, int, tuple[str, ...]], Target]] = {
    "classify": _class_target, "multilabel": _label_targets, "regress": _value_targets, "survive": _survival_target,
}  # fmt: skip
KINDS = tuple(_READERS)


def balance_labels(kind: str, targets: Sequence[Target]) -> I32:
    """int32[n]: what balancing and stratifying go by: the class, the first label that holds, whether the event
    happened; -1 where that is unknown or there is nothing of the kind."""
    return np.array([-1 if kind == "regress" else _balancing_class(target) for target in targets], np.int32)


def _balancing_class(target: Target) -> int:
    if isinstance(target, int):
        return max(target, -1)
    if isinstance(target, Survival):
        return -1 if math.isnan(target.time) else int(target.event)
    hits = np.flatnonzero(np.asarray(target, np.float32) > 0.5).tolist() if isinstance(target, np.ndarray) else []
    return hits[0] if hits else -1
