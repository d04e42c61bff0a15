"""Tables of slides become truth; what is unknown stays unknown, what is wrong is named with its row."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wsi_mmm.errors import ConfigError, ManifestError
from wsi_mmm.tasks.targets import Survival
from wsi_mmm.training.data.tables import TableTask, balance_labels, read_table, slide_table

TEXT = """slide,patient,fold,grade,msi,tils,er,pr,sites,months,died
a,P1,train,G1,1,0.5,yes,no,lung;liver,12.5,1
b,P1,train,G2,,,NA,1,none,30,0
c,P2,test,unknown,0,1e-2,0,,,,1
"""
TASKS = (
    TableTask("grade", "classify", ("grade",), ("G1", "G2", "G3")),
    TableTask("msi", "classify", ("msi",), ("stable", "high"), {"0": "stable", "1": "high"}),
    TableTask("receptors", "multilabel", ("er", "pr"), ("ER", "PR")),
    TableTask("sites", "multilabel", ("sites",), ("liver", "lung", "bone")),
    TableTask("tils", "regress", ("tils",)),
    TableTask("survival", "survive", ("months", "died")),
)


def written(path: Path, text: str = TEXT) -> str:
    path.write_text(text)
    return str(path)


def test_every_kind_of_truth_is_read(tmp_path: Path) -> None:
    """Classes, mapped cells, flags, joined labels, numbers, survival; unknown cells are unknown truth."""
    found = slide_table(read_table(written(tmp_path / "t.csv")), TASKS, group="patient", split="fold")
    assert (found.slides, found.groups, found.splits) == (
        ("a", "b", "c"),
        ("P1", "P1", "P2"),
        ("train", "train", "test"),
    )
    assert found.targets["grade"] == (0, 1, -1)
    assert found.targets["msi"] == (1, -1, 0)
    assert np.array_equal(found.targets["receptors"], [[1, 0], [np.nan, 1], [0, np.nan]], equal_nan=True)
    assert np.array_equal(found.targets["sites"], [[1, 1, 0], [0, 0, 0], [np.nan] * 3], equal_nan=True)
    assert np.array_equal(found.targets["tils"], np.float32([[0.5], [np.nan], [0.01]]), equal_nan=True)
    assert found.targets["survival"][:2] == (Survival(12.5, True), Survival(30, False))
    last = found.targets["survival"][2]
    assert isinstance(last, Survival) and math.isnan(last.time) and not last.event
    assert found.of(0)["grade"] == 0
    assert all(target.dtype == np.float32 for target in found.targets["receptors"])  # type: ignore[union-attr]


def test_tsv_and_parquet_say_the_same(tmp_path: Path) -> None:
    """Numbers and gaps of Parquet included: the class 1 is not 1.0."""
    plain = slide_table(read_table(written(tmp_path / "t.csv")), TASKS)
    tabbed = slide_table(read_table(written(tmp_path / "t.tsv", TEXT.replace(",", "\t"))), TASKS)
    rows = [line.split(",") for line in TEXT.splitlines()]
    columns = {key: [row[n] for row in rows[1:]] for n, key in enumerate(rows[0])}
    arrays = {key: pa.array(cells) for key, cells in columns.items()} | {
        "msi": pa.array([1.0, None, 0.0]),
        "tils": pa.array([0.5, float("nan"), 0.01]),
        "died": pa.array([True, False, True]),
    }
    pq.write_table(pa.table(arrays), tmp_path / "t.pq")
    stored = slide_table(read_table(str(tmp_path / "t.pq")), TASKS)
    for other in (tabbed, stored):
        assert repr(other.targets) == repr(plain.targets)
    assert plain.groups == plain.slides and plain.splits == ("", "", "")


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("b,P1,train,G2", "b,P1,train,G9", r"row 3: column 'grade' holds 'G9', which is none of G1, G2, G3"),
        ("c,P2", ",P2", "row 4: no slide"),
        ("c,P2", "a,P2", "row 4: slide 'a' is already in row 2"),
        ("c,P2", "c,", "row 4: no patient"),
        ("12.5", "soon", "row 2: column 'months' holds 'soon', which is no number"),
        ("12.5", "-3", "row 2: .* time -3"),
        ("12.5", "inf", "row 2: .* no number"),
        ("lung;liver", "lung;brain", "row 2: column 'sites' holds 'brain'"),
        ("yes", "maybe", "row 2: column 'er' holds 'maybe'"),
        ("slide,patient", "image,patient", "no column 'slide'; it has image, patient"),
        ("slide,patient", "slide,slide", "two columns 'slide'"),
        ("c,P2,test", "c,P2", "row 4: 10 cells, but 11 columns"),
    ],
)
def test_what_is_wrong_is_named_with_its_row(tmp_path: Path, old: str, new: str, match: str) -> None:
    """Rows are counted as a spreadsheet shows them."""
    uri = written(tmp_path / "t.csv", TEXT.replace(old, new, 1))
    with pytest.raises(ManifestError, match=match):
        slide_table(read_table(uri), TASKS, group="patient")


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    """Bytes of other files, an empty one, a broken Parquet."""
    for data in (b"\xff\xfe\x00", b"", b"PAR1 and no more"):
        (tmp_path / "x.csv").write_bytes(data)
        with pytest.raises(ManifestError, match=r"x\.csv"):
            read_table(str(tmp_path / "x.csv"))


@pytest.mark.parametrize(
    ("kind", "columns", "labels"),
    [("classify", ("a", "b"), ("x",)), ("classify", ("a",), ()), ("survive", ("a",), ()), ("segment", ("a",), ()),
     ("multilabel", ("a", "b"), ("x", "y", "z"))],
)  # fmt: skip
def test_a_task_that_cannot_learn_from_its_columns_is_refused(
    kind: str, columns: tuple[str, ...], labels: tuple[str, ...]
) -> None:
    """Before any file is read."""
    with pytest.raises(ConfigError, match="task 't'"):
        TableTask("t", kind, columns, labels)


def test_balancing_goes_by_class_label_or_event(tmp_path: Path) -> None:
    """Regression has nothing to balance by."""
    found = slide_table(read_table(written(tmp_path / "t.csv")), TASKS).targets
    assert balance_labels("classify", found["grade"]).tolist() == [0, 1, -1]
    assert balance_labels("multilabel", found["sites"]).tolist() == [0, -1, -1]
    assert balance_labels("survive", found["survival"]).tolist() == [1, 0, -1]
    assert balance_labels("regress", found["tils"]).tolist() == [-1, -1, -1]
