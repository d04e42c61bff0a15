"""The command that trains: what it prints before, while and after, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from shapely.geometry import Point, Polygon, box
from typer.testing import CliRunner, Result

from helpers.annotation_targets import MODEL, discs, geojson, joint, patches
from wsi_mmm import api
from wsi_mmm.cli import console, train
from wsi_mmm.cli.main import app
from wsi_mmm.cli.train import EVERY, _LossLines
from wsi_mmm.errors import Cancelled, NotFinite
from wsi_mmm.outputs.exports import write_features
from wsi_mmm.slides.fake import SyntheticNuclei
from wsi_mmm.training.data.embedding import source_identity
from wsi_mmm.training.examples import EXAMPLES
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


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_the_examples_are_valid_by_the_printed_schema(name: str) -> None:
    """--example is what --schema describes; without a name it is that of pictures."""
    schema = json.loads(invoke("--schema").stdout)
    example = invoke("--example", name).stdout
    assert example == EXAMPLES[name] and invoke("--example").stdout == EXAMPLES["pictures"]
    jsonschema.validate(tomllib.loads(example), schema)
    assert "tracking" in schema["properties"]
    wrong = invoke("--example", "films")
    assert wrong.exit_code == 1 and "no example 'films'; choose one of: pictures, slides, bags" in wrong.stderr


def files_of_pictures(folder: Path) -> None:
    """Patches of two classes and four patients, and pictures with masks."""
    discs(folder / "glands")
    patches(folder / "made")
    for name, made in (("tumour", "dark"), ("normal", "pale")):
        for path in (folder / "made" / made).iterdir():
            target = folder / "patches" / name / path.name.replace("p", "patient", 1)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)


def files_of_slides(folder: Path, slide: Path) -> None:
    """Four slides of four patients with a region that was annotated, in QuPath's words, and a point."""
    (folder / "slides").mkdir()
    for number in range(1, 5):
        (folder / "slides" / f"P{number}_a.tiff").symlink_to(slide)
        shapes = [("ROI", box(0, 0, 1400, 1100)), ("Tumor", box(0, 0, 700, 1100)), ("Stroma", box(700, 0, 1300, 1100)),
                  ("Tumor", Point(1350, 600)), ("Fat", box(1350, 0, 1390, 40))]  # fmt: skip
        geojson(folder / "slides" / f"P{number}_a.geojson", shapes)


def files_of_bags(folder: Path) -> None:
    """Eight slides' vectors as embed writes them, and the table."""
    made = {"encoder": "default", "model_hash": source_identity("default", None), "mpp": 0.5, "patch_size": 256,
            "overlap": 0}  # fmt: skip
    rows = ["slide,patient,grade"]
    for number in range(8):
        vectors = np.random.default_rng(number).normal(size=(3, 224)).astype(np.float32)
        write_features(f"{folder}/features/s{number}/features.zarr", vectors, np.zeros((3, 2), np.int64), made)
        rows.append(f"s{number},p{number},{('low', 'high')[number % 2]}")
    (folder / "slides.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_every_example_passes_its_dry_run_when_its_files_are_there(name: str, in_tmp: Path, tiny_slide: Path) -> None:
    """And names the first that is missing when they are not."""
    path = in_tmp / "example.toml"
    path.write_text(invoke("--example", name).stdout)
    missing = invoke(path, "--dry-run")
    assert missing.exit_code == 1 and missing.stderr.count("\n") == 1, missing.output
    if name == "slides":
        files_of_slides(in_tmp, tiny_slide)
    else:
        {"pictures": files_of_pictures, "bags": files_of_bags}[name](in_tmp)
    found = invoke(path, "--dry-run")
    assert found.exit_code == 0, found.output
    words = {"pictures": "'background' is the background, which is not drawn", "bags": "low 3, high 3",
             "slides": "points among them: 4, learnt as discs of 4 µm"}[name]  # fmt: skip
    assert words in found.stdout and "warning" not in found.stdout, found.stdout


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("validation.best=tissue.mean_iou", "validation.best is 'tissue.mean_iou': a task of kind 'classify' gives"),
        ("validation.best=tissues.f1", "give task.metric; tasks are: tissue, disc"),
        ("model.encoder.name=resnet1000", "resnet1000"),
        ("optim.frozen=99", "frozen is 99, but the model has"),
        ("out=s3://bucket/run", "the model is written to a local folder"),
    ],
)
def test_a_dry_run_refuses_what_the_training_would_refuse(config: Path, setting: str, words: str) -> None:
    """Before hours of queueing: a metric that the task does not have, an encoder that nobody knows, and the like."""
    result = invoke(config, "--dry-run", "--set", setting)
    assert result.exit_code == 1 and words in result.stderr and result.stderr.count("\n") == 1, result.output


def test_a_dry_run_refuses_a_missing_mask(config: Path, tmp_path: Path) -> None:
    """The picture without one is named."""
    gone = next((tmp_path / "discs" / "masks").iterdir())
    gone.unlink()
    result = invoke(config, "--dry-run")
    assert result.exit_code == 1 and gone.stem in result.stderr and result.stderr.count("\n") == 1, result.output


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
