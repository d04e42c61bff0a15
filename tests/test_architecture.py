"""docs/architecture.md lists the floors of the import contract; ``python tests/test_architecture.py`` writes them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
_FLOORS = re.compile(r"(?<=<!-- floors -->\n).*?(?=<!-- /floors -->)", re.DOTALL)


def floors() -> str:
    """The layers of the first contract, from the top down, as a block of text."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    return "```text\n" + "\n".join(layers) + "\n```\n"


def test_the_page_has_the_floors_of_the_contract() -> None:
    """Generated, so that they cannot drift apart."""
    assert _FLOORS.search(PAGE.read_text(encoding="utf-8"))[0] == floors()  # type: ignore[index]


def test_every_module_of_the_package_has_a_row() -> None:
    """Each name at the top of the package stands in the table of the page."""
    text = PAGE.read_text(encoding="utf-8")
    names = {
        path.stem for path in (ROOT / "wsi_mmm").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    missing = [name for name in names - {"__init__", "__main__"} if not re.search(rf"`{name}/?`", text)]
    assert missing == []


if __name__ == "__main__":
    PAGE.write_text(_FLOORS.sub(lambda _: floors(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
