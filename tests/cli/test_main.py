"""The command line: what it forwards, what it prints, how it ends. The api behind it is a fake here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.commands import invoke, json_lines
from wsi_mmm.cli import console
from wsi_mmm.cli.main import show_warning
from wsi_mmm.config import SlideSpec
from wsi_mmm.engine.events import Event
from wsi_mmm.engine.monitoring.observe import Observe
from wsi_mmm.engine.monitoring.run_report import exit_code
from wsi_mmm.errors import Cancelled, ModelError, OutputError
from wsi_mmm.inputs import expand_inputs
from wsi_mmm.model.card import model_path
from wsi_mmm.options import OBSERVE_OPTIONS, RUN_OPTIONS, Option, RunOptions, command_options

COMMANDS = ["run", "embed", "info", "thumbnail", "tissue", "models", "export", "doctor", "demo", "cache"]


@dataclass
class Row:
    id: str
    status: str
    error: str = ""
    objects: int = 0
    traceback: str = ""

    @property
    def extra(self) -> dict[str, Any]:
        files = {name: f"out/{self.id}/{file}" for name, file in FILES.items()}
        return {"files": files if self.status != "failed" else {}, "traceback": self.traceback}


FILES = {"geojson": "result.geojson.gz", "overlay": "overlay.png"}


@dataclass
class Report:
    slides: list[Row]
    path: str = "out/report.html"
    output: str = "out"
    seconds: float = 12.3
    unsaved: str = ""

    @property
    def exit_code(self) -> int:
        return exit_code([row.status for row in self.slides], saved=not self.unsaved)


@dataclass
class Request:
    """What the api would run: one task per slide."""

    tasks: list[SlideSpec]


@dataclass
class FakeApi:
    """Stands in for wsi_mmm.api: checks options and slides as it does, remembers what it was called with."""

    statuses: list[str] = field(default_factory=lambda: ["done"])
    error: BaseException | None = None
    unsaved: str = ""
    traceback: str = ""
    calls: list[tuple[str, Any, dict[str, Any]]] = field(default_factory=list)
    observe: Observe | None = None

    def _report(self, progress: Callable[[Event], None]) -> Report:
        for number, status in enumerate(self.statuses, start=1):
            progress(Event("slide", f"s{number}", number, len(self.statuses), status))
        rows = [
            Row(f"s{number}", status, "broken" * (status == "failed"), traceback=self.traceback)
            for number, status in enumerate(self.statuses, 1)
        ]
        return Report(rows, unsaved=self.unsaved)

    def _request(self, name: str, slides: list[str], options: dict[str, Any]) -> Request:
        known = {option.name for option in RUN_OPTIONS}
        RunOptions(**{option: value for option, value in options.items() if option in known})
        specs = expand_inputs(slides)
        self.calls.append((name, specs, options))
        if self.error is not None:
            raise self.error
        return Request(specs)

    def run_request(self, slides: list[str], **options: Any) -> Request:
        return self._request("run", slides, options)

    def embed_request(self, slides: list[str], **options: Any) -> Request:
        return self._request("embed", slides, options)

    def execute(self, request: Request, progress: Callable[[Event], None], *, observe: Observe) -> Report:
        self.observe = observe
        return self._report(progress)

    def submit(self, scheduler: str, slides: list[str], *, observe: Observe, **options: Any) -> types.SimpleNamespace:
        self.observe = observe
        self._request("submit", slides, {"scheduler": scheduler, **options})
        return types.SimpleNamespace(id="1a2b")

    def demo(self, output: str, **options: Any) -> Report:
        self.calls.append(("demo", output, options))
        return self._report(options["progress"])


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    """The fake in place of the real api."""
    import wsi_mmm

    fake = FakeApi()
    module = types.ModuleType("wsi_mmm.api")
    names = ("run_request", "embed_request", "execute", "submit", "demo")
    module.__dict__.update({name: getattr(fake, name) for name in names})
    monkeypatch.setitem(sys.modules, "wsi_mmm.api", module)
    monkeypatch.setattr(wsi_mmm, "api", module, raising=False)
    return fake


# ------------------------------------------------------------------------------------------------ help


EMPTY = """
import typer
app = typer.Typer(no_args_is_help=True)
for name in ("one", "two"):
    app.command(name)(lambda: None)
"""


def _modules_of_help(setup: str) -> set[str]:
    """The names of the modules that ``--help`` of an app imports."""
    script = f"{setup}\napp(['--help'], standalone_mode=False)\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True, timeout=100)
    return set(done.stdout.splitlines()[-1].split())


def test_help_imports_little_more_than_the_help_of_an_empty_command() -> None:
    """What makes ``--help`` slow is imports: ours are the commands themselves and a little of the standard library."""
    ours = _modules_of_help("from wsi_mmm.cli.main import app") - _modules_of_help(EMPTY)
    floors = {name.split(".")[1] for name in ours if name.startswith("wsi_mmm.")}
    assert floors == {"_version", "cli", "config", "errors", "host_tuning", "options"}
    assert {name.split(".")[0] for name in ours} - {"wsi_mmm"} <= sys.stdlib_module_names
    assert len(ours) < 45, sorted(ours)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_examples_and_exit_codes(command: str) -> None:
    """Help teaches by example and says what an exit code means."""
    text = invoke(command, "--help").stdout
    assert "Examples:" in text
    assert f"wsi-mmm {command}" in text
    assert "Exit codes:" in text


def test_no_command_shows_help_and_version_shows_version() -> None:
    """The bare command teaches; --version is one line."""
    assert "Begin with" in invoke().output
    assert re.fullmatch(r"wsi-mmm \d+\.\d+\.\d+\n", invoke("--version").stdout)


# ------------------------------------------------------------------------------------------------ forwarding


def test_warnings_for_users_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """What a user can act on is a line; what a programmer must see names its place in the code."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show_warning
        warnings.warn("x.tif is stored in strips", stacklevel=1)
        warnings.warn("old name", DeprecationWarning, stacklevel=1)
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == "warning: x.tif is stored in strips"
    assert "test_main.py" in second and "DeprecationWarning: old name" in second


def test_run_forwards_only_what_was_given(api: FakeApi) -> None:
    """Defaults live in the api alone."""
    assert invoke("run", "a.svs", "-o", "out").exit_code == 0
    name, slides, options = api.calls[0]
    assert name == "run"
    assert [(spec.uri, spec.id) for spec in slides] == [("a.svs", "a")]
    assert options == {"output": "out"} and api.observe == Observe()


SAID: dict[str, tuple[tuple[str, ...], object]] = {
    "tasks": (("--task", "t", "--task", "u"), ["t", "u"]), "cache_tiles": (("--cache-tiles", "off"), "off"),
    "runtime": (("--runtime", "bf16"), "bf16"), "device": (("--device", "cpu"), "cpu"),
    "mag": (("--mag", "20"), 0.5), "placement": (("--placement", "pool", "--cache", "c"), "pool"),
    "cache_quota": (("--cache-quota", "50GB"), "50GB"), "measure": (("--measure", "none"), "none"),
}  # fmt: skip
"""Words and value of flags that take no number and no plain word."""
OBSERVED = {option.name for option in OBSERVE_OPTIONS}


@pytest.mark.parametrize(
    ("command", "option"),
    [(command, option) for command in ("run", "embed") for option in command_options(command)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_every_flag_reaches_the_api(command: str, option: Option, api: FakeApi, in_tmp: Path) -> None:
    """Each flag arrives under its name, with its type; a flag that is not forwarded does what it says."""
    plain = {str: ("x", "x"), int: ("3", 3), float: ("0.3", 0.3)}
    value: object = option.flag_value
    words = (option.flags[-1],)
    if option.value_type in plain:
        words, value = (*words, plain[option.value_type][0]), plain[option.value_type][1]
    words, value = SAID.get(option.name, (words, value))
    if option.name == "config":
        (in_tmp / "run.toml").write_text("min_tissue = 0.3\n")
        words, value = ("--config", "run.toml"), 0.3
    if option.name in ("dry_run", "detach"):
        words = (*words, "--scheduler", "tcp://h:1")
    done = invoke(command, "a.svs", *words)
    if option.name == "dry_run":
        assert api.calls[0][0] == command and api.observe is None
        return
    assert done.exit_code == 0, done.stderr
    if option.name in OBSERVED:
        assert getattr(api.observe, option.name) == {"traces": "otlp"}.get(option.name, value)
        return
    name = {"mag": "mpp", "config": "min_tissue", "detach": "scheduler"}.get(option.name, option.name)
    assert api.calls[0][2][name] == (value if option.name != "detach" else "tcp://h:1")
    assert api.calls[0][0] == ("submit" if option.name == "detach" else command)


def test_detaching_needs_a_scheduler(api: FakeApi) -> None:
    """One line that names the flag."""
    result = invoke("run", "a.svs", "--detach")
    assert (result.exit_code, result.stderr) == (1, "error: --detach needs --scheduler ADDRESS\n")


def test_embed_forwards_encoder_and_weights(api: FakeApi) -> None:
    """``-m`` names the encoder."""
    assert invoke("embed", "a.svs", "-o", "out", "-m", "resnet18", "--weights", "random").exit_code == 0
    assert {"encoder": "resnet18", "weights": "random"}.items() <= api.calls[0][2].items()


def test_flags_win_over_settings_and_settings_over_the_environment(
    api: FakeApi, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flag, then file, then WSI_MMM_CACHE."""
    monkeypatch.setenv("WSI_MMM_CACHE", "from-environment")
    (in_tmp / "run.toml").write_text('mpp = 0.25\ntile_size = 512\nblock_tiles = 8\ncache = "from-file"\n')
    assert invoke("run", "a.svs", "--config", "run.toml", "--mpp", "0.5").exit_code == 0
    expected = {"mpp": 0.5, "tile_size": 512, "block_tiles": 8, "cache": "from-file"}
    assert expected.items() <= api.calls[0][2].items()
    assert invoke("run", "a.svs").exit_code == 0
    assert api.calls[1][2]["cache"] == "from-environment"


# ------------------------------------------------------------------------------------------------ endings


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["done"], 0),
        (["done", "empty"], 0),
        (["done", "partial"], 3),
        (["done", "failed"], 3),
        (["partial"], 3),
        (["failed", "failed"], 4),
    ],
)
def test_the_exit_code_says_how_the_slides_fared(api: FakeApi, statuses: list[str], code: int) -> None:
    """0 only when every slide succeeded; empty glass is a success; 3 some, 4 all failed."""
    api.statuses = statuses
    assert invoke("run", "a.svs").exit_code == code


def test_a_failed_slide_is_named_with_its_reason_on_stderr(api: FakeApi) -> None:
    """The last lines tell which slide failed and why."""
    api.statuses = ["done", "failed"]
    result = invoke("run", "a.svs")
    assert result.stderr == "error: s2 failed: broken\n"
    assert "1 done, 1 failed in 12 s\n" in result.stdout
    assert "report   out/report.html\n" in result.stdout


def test_an_error_is_one_line_without_traceback(api: FakeApi) -> None:
    """A WsiError prints its text and exits 1."""
    api.error = ModelError("no model 'x';\nmodels lists them")
    result = invoke("run", "a.svs", "-m", "x")
    assert (result.exit_code, result.stderr) == (1, "error: no model 'x'; models lists them\n")


def test_debug_shows_the_traceback(api: FakeApi) -> None:
    """The traceback comes before the line."""
    api.error = OutputError("disk full")
    result = invoke("run", "a.svs", "--debug")
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("error: disk full\n")


def test_debug_shows_the_traceback_of_a_slide(api: FakeApi) -> None:
    """A fault that is not the user's comes with its traceback from the worker; the line says how to see it."""
    api.statuses, api.traceback = ["failed"], "Traceback: my_plugin.py\n"
    assert invoke("run", "a.svs").stderr == "error: s1 failed: broken (--debug shows where)\n"
    assert invoke("run", "a.svs", "--debug").stderr == "Traceback: my_plugin.py\nerror: s1 failed: broken\n"


def test_a_few_slides_are_named_with_their_files_and_many_with_their_folder(api: FakeApi) -> None:
    """The last lines say what to open."""
    text = invoke("run", "a.svs").stdout
    assert "GeoJSON  out/s1/result.geojson.gz  (open the slide in QuPath" in text
    api.statuses = ["done"] * 6
    text = invoke("run", "a.svs").stdout
    assert "results  out  (a folder per slide)" in text
    assert "GeoJSON" not in text


def test_a_report_that_cannot_be_written_is_said_after_the_slides(api: FakeApi) -> None:
    """The slides' own outcome is told all the same, and the exit code is not 0."""
    api.unsaved = "out/report.json: the disk is full; free space"
    result = invoke("run", "a.svs")
    assert "1 done" in result.stdout
    assert (result.exit_code, result.stderr) == (3, f"error: the report could not be written: {api.unsaved}\n")


@pytest.mark.parametrize("error", [Cancelled("stopped"), KeyboardInterrupt()])
def test_stopping_exits_130_and_says_how_to_resume(api: FakeApi, error: BaseException) -> None:
    """Ctrl-C is no failure: the same command goes on from there."""
    api.error = error
    result = invoke("run", "a.svs")
    assert (result.exit_code, result.stderr) == (130, "error: stopped; run the same command again to resume\n")


def test_an_unforeseen_error_is_a_line_too(api: FakeApi) -> None:
    """Even a bug of ours shows no traceback unless asked, and says how to ask."""
    api.error = ZeroDivisionError("division by zero")
    result = invoke("run", "a.svs")
    assert result.exit_code == 1
    assert re.fullmatch(r"error: unexpected ZeroDivisionError: division by zero; .*--debug\n", result.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "a.svs", "--mpp", "0"], "mpp 0.0 is not possible"),
        (["run", "a.svs", "--mpp", "nan"], "mpp nan is not possible"),
        (["run", "a.svs", "--mpp", "0.5", "--mag", "20"], "not both"),
        (["run", "nowhere/*.svs"], "no file matches nowhere/*.svs"),
        (["run", "none.csv"], "no manifest at none.csv"),
        (["run", "a.svs", "--config", "none.toml"], "no settings file"),
        (["info", "none.svs", "--mpp-override", "-1"], "mpp -1.0 is not possible"),
        (["export", "nowhere"], "no features.zarr at nowhere"),
    ],
)
def test_wrong_input_ends_before_anything_runs(api: FakeApi, in_tmp: Path, arguments: list[str], message: str) -> None:
    """Exit code 1, one line, and the api was never called."""
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert api.calls == []


@pytest.mark.parametrize(
    "arguments", [["run"], ["run", "a.svs", "--nonsense"], ["nonsense"], ["run", "a", "--mpp", "x"]]
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    """Unknown commands, flags and types are typer's own error."""
    assert invoke(*arguments).exit_code == 2


# ------------------------------------------------------------------------------------------------ talking


def test_json_is_one_object_per_line_and_nothing_else(api: FakeApi) -> None:
    """Events, then the report."""
    api.statuses = ["done", "failed"]
    lines = json_lines(invoke("run", "a.svs", "--json"))
    assert [next(iter(value)) for value in lines] == ["event", "event", "report"]
    assert lines[0]["event"] == {"kind": "slide", "slide": "s1", "done": 1, "total": 2, "message": "done"}
    assert [row["status"] for row in lines[2]["report"]["slides"]] == ["done", "failed"]


def test_json_of_one_command_does_not_last_to_the_next(api: FakeApi) -> None:
    """Flags belong to the command they were given to."""
    invoke("run", "a.svs", "--json")
    assert "1 slide -> results" in invoke("run", "a.svs").stdout


def test_values_become_plain_json() -> None:
    """NaN is null, numpy scalars are numbers, paths are text."""
    value = {"a": float("nan"), "b": np.float32(0.5), "c": (1, None), "d": Path("x"), "e": Row("i", "done")}
    assert console.plain(value) == {
        "a": None, "b": 0.5, "c": [1, None], "d": "x",
        "e": {"id": "i", "status": "done", "error": "", "objects": 0, "traceback": ""},
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ rehearsal


def test_a_dry_run_opens_every_slide_and_computes_nothing(tiny_slide: Path, in_tmp: Path) -> None:
    """It lists what can be read and names what cannot, with the exit code of the run to come."""
    result = invoke("run", tiny_slide, "none.svs", "-o", "out", "--dry-run")
    assert (result.exit_code, result.stderr) == (3, f"error: none: {in_tmp}/none.svs: no such file; check the path\n")
    assert "tiny  1536 x 1152 px, 0.5 mpp, at most 12 tiles" in result.stdout
    assert "1 of 2 slides can be read at 0.5 mpp -> out" in result.stdout
    assert not list((in_tmp / "out").iterdir())
    assert "warning" not in result.stdout
    assert invoke("embed", tiny_slide, "-o", "out", "--mpp", "0.1", "--dry-run").exit_code == 4
    said = invoke("run", tiny_slide, "-o", "out", "--mag", "10", "--dry-run").stdout
    assert said.startswith("warning: default learnt at 0.5 mpp and is to work at 1 mpp")
    assert invoke("run", tiny_slide, "-o", "out", "--task", "x", "--dry-run").exit_code == 1
    shutil.copytree(model_path("default"), "model")
    card = Path("model/card.json")
    card.write_text(card.read_text().replace('"classify"', '"odd"'))
    result = invoke("run", tiny_slide, "-o", "out", "-m", "model", "--dry-run")
    assert result.exit_code == 1 and "unknown kind 'odd'" in result.stderr


def test_a_dry_run_reads_the_files_that_say_where_to_look(tiny_slide: Path, in_tmp: Path) -> None:
    """A mask or regions that are not there, are no such file, or lie off the slide; of a row of a manifest, too."""
    ring = '{"type": "Polygon", "coordinates": [[[%d, 0], [%d, 0], [%d, 900], [%d, 0]]]}'
    Path("on.geojson").write_text(ring % (0, 900, 900, 0))
    Path("off.geojson").write_text(ring % (900000, 900900, 900900, 900000))
    Path("m.csv").write_text(f"slide,mask\n{tiny_slide},gone.geojson\n")
    good = invoke("run", tiny_slide, "-o", "out", "--tissue", "on.geojson", "--regions", "on.geojson", "--dry-run")
    assert good.exit_code == 0
    for option, file, words in (
        ("--tissue", "gone.geojson", "no file is there"),
        ("--tissue", "off.geojson", "hold no pixel of the slide"),
        ("--regions", "off.geojson", "hold no pixel of the slide"),
        ("--regions", "gone.geojson", "gone.geojson"),
    ):
        bad = invoke("run", tiny_slide, "-o", "out", option, file, "--dry-run")
        assert bad.exit_code == 4 and words in " ".join(bad.stderr.split())
    assert invoke("run", "m.csv", "-o", "out", "--dry-run").exit_code == 4


# ------------------------------------------------------------------------------------------------ demo


def test_demo_prints_where_the_three_files_are(api: FakeApi) -> None:
    """GeoJSON, picture and report, each on its line."""
    text = invoke("demo", "-o", "x", "--seed", "3").stdout
    assert api.calls[0][2]["seed"] == 3
    for path in ("out/s1/result.geojson.gz", "out/s1/overlay.png", "out/report.html"):
        assert path in text
