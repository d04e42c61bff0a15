"""The command that trains: what it prints before, while and after, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from shapely.geometry import Polygon
from typer.testing import CliRunner, Result

from helpers.annotation_targets import MODEL, geojson, joint
from wsi_mmm import api
from wsi_mmm.cli import console, train
from wsi_mmm.cli.main import app
from wsi_mmm.cli.train import EVERY, EXAMPLE, _LossLines
from wsi_mmm.errors import Cancelled, NotFinite
from wsi_mmm.slides.fake import SyntheticNuclei
from wsi_mmm.training.fit import StepReport


def invoke(*arguments: str | Path) -> Result:
    """The result of ``wsi-mmm train ARGUMENTS``; an exception that no command may let out fails the test."""
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def toml(value: Any) -> str:
    """A TOML value."""
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {toml(item)}' for key, item in value.items()) + "}"
    return "[" + ", ".join(map(toml, value)) + "]" if isinstance(value, list) else json.dumps(value)


def written(path: Path, raw: dict[str, Any]) -> Path:
    """``raw`` as a TOML file."""
    path.write_text("".join(f"{key} = {toml(value)}\n" for key, value in raw.items()))
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Two tasks from two tiny data sets."""
    return written(tmp_path / "joint.toml", joint(tmp_path))


@pytest.fixture
def slides(tmp_path: Path, tiny_slide: Path, tiny_truth: SyntheticNuclei) -> Path:
    """Nuclei of two slides, annotated under another name."""
    for name in "ab":
        (tmp_path / f"{name}.tiff").symlink_to(tiny_slide)
        geojson(tmp_path / f"{name}.geojson", [("Cell", Polygon(xy)) for xy in tiny_truth.polygons])
    task = {"name": "nuclei", "kind": "instances", "classes": ["nucleus"]}
    shapes = {"nuclei": {"complete": True, "buckets": [{"label": "nucleus", "pattern": "Cell"}]}}
    data = {
        "name": "cells", "kind": "slides", "task": "nuclei", "slides": [f"{tmp_path}/a.tiff", f"{tmp_path}/b.tiff"],
        "shapes": shapes, "per_slide": 3,
    }  # fmt: skip
    raw = {"out": str(tmp_path / "run"), "model": {**MODEL, "tile_size": 64}, "task": [task], "data": [data],
           "split": {"val": 0.5}}  # fmt: skip
    return written(tmp_path / "slides.toml", raw)


def test_the_example_is_valid_by_the_printed_schema() -> None:
    """--example is what --schema describes."""
    schema = json.loads(invoke("--schema").stdout)
    example = invoke("--example").stdout
    assert example == EXAMPLE
    jsonschema.validate(tomllib.loads(example), schema)
    assert "tracking" in schema["properties"]


def test_help_teaches_by_example() -> None:
    """Help has examples of its commands and says what exit codes mean."""
    text = invoke("--help").stdout
    assert "wsi-mmm train joint.toml --dry-run" in text and "--fractions" in text and "Exit codes:" in text


def test_no_configuration_and_wrong_ones_are_one_line(config: Path, tmp_path: Path) -> None:
    """Exit code 1 and a line that names the fix."""
    for arguments, words in (
        ((), "give a configuration; wsi-mmm train --example prints one"),
        ((tmp_path / "no.toml",), "no settings file at"),
        ((config, "--set", "steps"), "give key=value"),
        ((config, "--set", "data.patches.path=/nowhere"), "no picture|cannot be listed"),
        ((config, "--fractions", "1,ten"), "give percents with commas, such as 1,10,50,100"),
        ((config, "--fractions", "0"), "fractions are percents above 0"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 1 and result.stdout == ""
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert any(word in result.stderr for word in words.split("|")), result.stderr
    assert invoke(config, "--nothing").exit_code == 2


def test_dry_run_says_what_there_is(config: Path, tmp_path: Path) -> None:
    """A table, or a JSON object, per data set; nothing is written."""
    lines = invoke(config, "--dry-run").stdout.splitlines()
    assert lines[0].split("\t") == ["data", "tasks", "train", "val", "test", "classes of train"]
    assert lines[1].split("\t") == ["patches", "tissue", "8", "4", "4", "dark 4, pale 4"]
    assert lines[-1].startswith("2 data sets (12 train, 6 val, 6 test items), 2 tasks")
    found = [json.loads(line) for line in invoke(config, "--dry-run", "--json").stdout.splitlines()]
    assert [row["data"] for row in found] == ["patches", "discs"] and found[0]["classes"] == {"dark": 4, "pale": 4}
    assert not (tmp_path / "run").exists()


def test_dry_run_shows_what_becomes_of_annotations(slides: Path) -> None:
    """The bucket table of slides comes first, so that it is seen even when it leaves nothing to learn from."""
    shown = invoke(slides, "--dry-run").stdout
    assert "data 'cells', task 'nuclei': what becomes of the annotations" in shown
    assert "nucleus: 240 objects" in shown and shown.index("240 objects") < shown.index("classes of train")
    first = json.loads(invoke(slides, "--dry-run", "--json").stdout.splitlines()[0])
    assert first["data"] == "cells" and first["annotations"]["lines"][0]["label"] == "nucleus"
    slides.write_text(slides.read_text().replace('"Cell"', '"Nucleus"'))
    wrong = invoke(slides, "--dry-run")
    assert "no rule fits: Cell" in wrong.stdout


def test_training_prints_lines_and_what_to_do_next(config: Path, tmp_path: Path) -> None:
    """Away from a terminal: how much of what, steps, validations, the figures as a table, the next command."""
    result = invoke(config, "--set", "validation.every=2")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("2 data sets") and any(line.startswith("step 1/3 loss tissue ") for line in lines)
    assert any(line.startswith("validation at step 2: tissue accuracy ") for line in lines)
    assert "task\tvalidation\tfigure" in lines and "task\ttest\tfigure" in lines
    assert lines[-1].startswith("done in") and lines[-1].endswith(f"-m {tmp_path}/run/model -o results/")
    again = invoke(config, "--set", "validation.every=2", "--json").stdout.splitlines()
    assert json.loads(again[-1])["model"] == f"{tmp_path}/run/model"


def test_training_speaks_json(config: Path) -> None:
    """An object per step, validation and checkpoint, and one at the end."""
    found = [json.loads(line) for line in invoke(config, "--json").stdout.splitlines()]
    assert [one["step"] for one in found if "losses" in one] == [1, 2, 3]
    assert any("checkpoint" in one for one in found) and any("val" in one and "step" in one for one in found)
    assert set(found[-1]) == {"model", "val", "test", "seconds"}


def progress(step: int, **more: Any) -> StepReport:
    facts = {"losses": {"a": 0.5, "b": 0.25}, "rate": 1e-3, "pace": 2.0, "norm": 1.0, "failed": (), "lost": 0,
             "skipped": 0, **more}  # fmt: skip
    return StepReport(step, 100, **facts)


def test_plain_lines_come_every_few_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step, then one line per few seconds, and the last step; what cannot be read is said at once."""
    monkeypatch.setattr(console.flags, "json", False)  # as the last command of another test may have left it
    now = [0.0]
    lines = _LossLines(lambda: now[0])
    for step, seconds in ((1, 0.0), (2, 1.0), (3, EVERY), (4, EVERY + 1)):
        now[0] = seconds
        lines(progress(step))
    lines(progress(5, failed=("x.png: broken", "y.png: broken"), lost=2))
    lines(progress(100, skipped=1))
    assert capsys.readouterr().out.splitlines() == [
        "step 1/100 loss a 0.500 b 0.250, 2.00 steps/s, 50 s left",
        "step 3/100 loss a 0.500 b 0.250, 2.00 steps/s, 48 s left",
        "warning: left out x.png: broken (2 so far)",
        "step 100/100 loss a 0.500 b 0.250, 2.00 steps/s, 0 s left, 1 steps skipped",
    ]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (Cancelled("training was stopped after step 7"), 130, "run the same command again to resume"),
        (KeyboardInterrupt(), 130, "run the same command again to resume"),
        (NotFinite("the loss of 'a' is nan"), 1, "the loss of 'a' is nan"),
    ],
)
def test_how_a_training_ends_early(
    config: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    """Ctrl-C is 130 and says that the same command goes on; a loss that is no number is 1; each is one line."""

    def train(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(api, "train", train)
    result = invoke(config)
    assert result.exit_code == code and words in result.stderr and result.stderr.count("\n") == 1


def test_other_ranks_say_nothing(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that writes no model prints no table."""
    from wsi_mmm.training.job import Trained

    monkeypatch.setattr(api, "train", lambda *_, **__: Trained())
    assert invoke(config).stdout == ""


@pytest.mark.slow
def test_two_ranks_do_one_training(config: Path, tmp_path: Path) -> None:
    """Under torchrun one of two ranks speaks and writes; the model is that of one process, up to its half precision."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "wsi_mmm",
        "train",
    ]
    shares = ["--fractions", "50,100", "--seeds", "1", "--set", "steps=2"]
    for more, out in (([], "two"), (shares, "shares")):
        done = subprocess.run([*command, str(config), "--set", f"out={tmp_path}/{out}", *more],
                              capture_output=True, text=True, timeout=130, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("2 data sets (") == (2 if more else 1)
    assert done.stdout.count("share\titems") == 1 and (tmp_path / "shares" / "fractions.csv").exists()
    invoke(config, "--set", f"out={tmp_path}/one")
    one, two = (api.load_model(tmp_path / name / "model").state_dict() for name in ("one", "two"))
    assert all((one[key] - two[key]).abs().max() < 2e-3 for key in one if one[key].is_floating_point())


def test_a_bar_on_a_terminal_counts_steps() -> None:
    """The bar takes steps and lines without a terminal at hand."""
    with train._draw_bar() as (step, line):
        step(progress(1, failed=("x: broken",), lost=1))
        line("validation at step 1")


def test_fractions_print_a_table_and_name_the_files(config: Path, tmp_path: Path) -> None:
    """A row per share with mean and deviation, then the table's and the plot's files; as JSON, one object."""
    arguments = (config, "--fractions", "50,100", "--seeds", "2", "--set", "steps=1", "--metric", "tissue.accuracy")
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    start = lines.index("share\titems\ttissue.accuracy (test)\tdeviation\tseeds")
    assert [line.split("\t")[:2] for line in lines[start + 1 : start + 3]] == [["50 %", "6"], ["100 %", "12"]]
    assert f"{tmp_path}/run/fractions.csv" in lines
    last = json.loads(invoke(*arguments, "--json").stdout.splitlines()[-1])
    assert last["metric"] == "tissue.accuracy" and [row["percent"] for row in last["rows"]] == [50, 100]
