"""Texts that name an option: each command that may show one has it."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import wsi_mmm
from wsi_mmm.cli.main import app
from wsi_mmm.options import EmbedKeywords

PACKAGE = Path(wsi_mmm.__file__).parent
FOREIGN = re.compile(r"\b(vips|pip|hf|aws|dcmdjpeg|dcmconv|gdcmconv) [^;,)]*")  # commands of other programs in a text
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
RUNS = ("run", "embed")
EVERYWHERE = ("--debug", "--json", "--help")
ON_A_CLUSTER = ("run", "embed", "doctor", "jobs list", "jobs watch", "jobs cancel", "jobs forget")
SHOWN_BY: dict[str, tuple[str, ...]] = {
    "cache/entry.py": RUNS,
    "cli/run.py": ("run",),
    "cli/slide.py": ("info",),
    "cli/train.py": ("train",),
    "empaia/app.py": ("empaia run",),
    "engine/executors/dask.py": (*ON_A_CLUSTER, "empaia run"),
    "engine/monitoring/logs.py": RUNS,
    "engine/recipe.py": RUNS,
    "engine/stages/context.py": RUNS,
    "engine/output_lock.py": (*RUNS, "demo"),
    "engine/stages/prepare.py": RUNS,
    "model/find_weights.py": ("embed", "models export", "fewshot fit"),
    "model/identity.py": (*RUNS, "empaia run"),
    "model/networks.py": RUNS,
    "model/onnx.py": (*RUNS, "empaia run"),
    "options.py": RUNS,
    "model/runner.py": RUNS,
    "model/slide_model.py": ("embed",),
    "model/slide_pooling.py": ("embed",),
    "outputs/inside.py": ("run",),
    "requests.py": ("run",),
    "tiles/listed.py": ("embed",),
    "tiles/tissue.py": (*RUNS, "tissue"),
    "training/config.py": ("train",),
    "training/examples.py": ("train",),
    "training/fewshot.py": ("fewshot fit",),
    "training/fewshot_run.py": ("fewshot fit",),
}
"""The commands that may show the texts of a module. Whoever names an option in another module says here who shows it:
texts of what `train` or several commands share name the option without dashes, as settings and Python have it."""


def flags(command: Any, name: str = "") -> Iterator[tuple[str, set[str]]]:
    """Every command with its long options."""
    for key, inner in getattr(command, "commands", {}).items():
        yield from flags(inner, f"{name} {key}".strip())
    if not hasattr(command, "commands"):
        yield name, {flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")}


FLAGS = dict(flags(typer.main.get_command(app)))


def texts(path: Path) -> Iterator[str]:
    """Literal texts of several words, docstrings and help aside; what is filled in later is a space."""
    tree = ast.parse(path.read_text())
    parents = {id(child): node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        parent: Any = parents.get(id(node))
        if isinstance(node, ast.JoinedStr):
            text = "".join(part.value if isinstance(part, ast.Constant) else " " for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        helps = isinstance(parent, ast.keyword) or (isinstance(parent, ast.Call) and _called(parent) in HELPS)
        if not isinstance(parent, ast.JoinedStr | ast.Expr) and not helps and " " in text.strip():
            yield text


HELPS = ("_run_option", "_command_option", "Option", "Argument", "make_app")


def _called(call: ast.Call) -> str:
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


FOUND = sorted(
    {
        (str(path.relative_to(PACKAGE)), option, text)
        for path in PACKAGE.rglob("*.py")
        for text in texts(path)
        for option in OPTION.findall(FOREIGN.sub("", text))
        if path.suffix == ".py" and path.name != "report_style.py"
    }
)  # fmt: skip


def test_there_are_texts_to_check() -> None:
    """The search finds what it is for, and the table holds nothing that is gone."""
    assert len(FOUND) >= 20
    assert set(SHOWN_BY) <= {module for module, _, _ in FOUND}


@pytest.mark.parametrize(("module", "option", "text"), FOUND, ids=lambda value: value[:24])
def test_an_option_in_a_text_exists_in_every_command_that_shows_it(module: str, option: str, text: str) -> None:
    """Or the text names the command whose option it is, or an environment variable that does the same."""
    named = [name for name in FLAGS if re.search(rf"(?<!\w){re.escape(name)} [^;]*{option}", text)]
    if named:
        assert any(option in FLAGS[name] for name in named), text
        return
    if option in EVERYWHERE or re.search(rf"{option} \(environment: WSI_MMM_\w+\)", text):
        assert any(option in own for own in FLAGS.values())
        return
    assert module in SHOWN_BY, f"say in SHOWN_BY which commands show: {text}"
    missing = [name for name in SHOWN_BY[module] if option not in FLAGS[name]]
    assert not missing, f"{missing} have no {option}: {text}"


KEYWORD = re.compile(r"\(Python: (\w+)=")


def test_keywords_that_texts_name_are_those_of_run_and_embed() -> None:
    """As in: give --mpp-override 0.25 (Python: mpp_override=0.25)."""
    named = {word for path in PACKAGE.rglob("*.py") for text in texts(path) for word in KEYWORD.findall(text)}
    assert named
    assert named <= {*EmbedKeywords.__annotations__, *inspect.signature(wsi_mmm.embed).parameters}
