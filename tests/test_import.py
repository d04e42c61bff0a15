"""What importing the package loads, and what it does not."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import wsi_mmm
from wsi_mmm import api

HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "dask",
    "distributed",
    "zarr",
    "shapely",
    "scipy",
    "skimage",
    "numpy",
    "openslide",
    "s3fs",
}


def modules_after(statement: str) -> set[str]:
    """Top-level modules loaded in a fresh interpreter after ``statement``."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import wsi_mmm", "import wsi_mmm.cli", "import wsi_mmm.config"])
def test_importing_loads_no_heavy_library(statement: str) -> None:
    """The package, its command line and its configuration load neither numpy nor torch, dask, zarr or shapely."""
    assert modules_after(statement) & HEAVY == set()


def test_importing_loads_no_rich() -> None:
    """The command line draws with rich only when it has something to draw."""
    assert "rich" not in modules_after("import wsi_mmm.cli.run")


def test_planning_needs_no_torch() -> None:
    """A client that plans and submits work gets by without torch."""
    assert "torch" not in modules_after("import wsi_mmm.api")


@pytest.mark.parametrize("name", [name for name in wsi_mmm.__all__ if name != "__version__"])
def test_public_names_are_found_in_their_homes(name: str) -> None:
    """Every public name can be got from the package, and tab completion shows it."""
    assert getattr(wsi_mmm, name) is not None
    assert name in dir(wsi_mmm)


def test_type_checkers_and_python_see_the_same_public_names() -> None:
    """Type checkers read the imports under TYPE_CHECKING, Python the table of homes."""
    body = ast.parse(Path(wsi_mmm.__file__).read_text()).body
    [block] = [node for node in body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {one.name: node.module for node in imports for one in node.names} == wsi_mmm._HOMES
    assert {name for name, home in wsi_mmm._HOMES.items() if home == "wsi_mmm.api"} <= set(api.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A misspelt public name fails like that of any module."""
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        _ = wsi_mmm.runn


def test_train_is_a_function_also_after_its_rooms_were_imported() -> None:
    """No subpackage may shadow the public verb."""
    import wsi_mmm.training

    assert callable(wsi_mmm.train) and wsi_mmm.training is not None
