"""docs/migrating.md: each command of ours that it shows can be typed, and each encoder that it names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from wsi_mmm.cli.main import app
from wsi_mmm.model.registry import find_entry

PAGE = Path(__file__).parents[1] / "docs" / "migrating.md"
TOOLS = ("TRIDENT", "CLAM", "STAMP", "slideflow", "WSInfer", "TIAToolbox", "QuPath")


def shown_commands(text: str) -> list[str]:
    """Our commands with something after the name, in fences and in backticks."""
    fenced = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    quoted = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return sorted({line for line in (*fenced, *quoted) if line.startswith("wsi-mmm ")})


def parse_command(line: str) -> dict[str, Any]:
    """Parse a command as the command line does, without running it: click's errors are raised."""
    words, command = shlex.split(line)[1:], typer.main.get_command(app)
    while hasattr(command, "commands") and words and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    if hasattr(command, "commands") and words:
        raise ValueError(f"no such command: {words[0]}")
    return command.make_context(line, words).params


COMMANDS = shown_commands(PAGE.read_text())


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_page_can_be_typed(line: str) -> None:
    """Its options exist, their values are of their kind, nothing is missing; its encoder is a published one."""
    named = parse_command(line).get("encoder") or []
    for name in [named] if isinstance(named, str) else named:
        assert find_entry(name) is not None


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("wsi-mmm embed a --tile 3", "no such option"), ("wsi-mmm export out --to npz", "is not one of"),
        ("wsi-mmm embed", "missing (argument|parameter)"), ("wsi-mmm runs a", "no such command"),
    ],
)  # fmt: skip
def test_the_check_refuses_what_cannot_be_typed(line: str, fault: str) -> None:
    """An option, a format, a command that is not there; a missing argument."""
    with pytest.raises(Exception, match=f"(?i){fault}"):
        parse_command(line)


def test_every_tool_has_a_table() -> None:
    """A section for each, with a table of three columns whose rows are whole; commands were found in all of them."""
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.S | re.M))
    assert set(TOOLS) <= set(sections)
    for tool in TOOLS:
        rows = [line for line in sections[tool].splitlines() if line.startswith("|")]
        assert rows[0] == f"| {tool} | wsi_mmm | what differs |" and len(rows) > 4
        assert {line.count("|") for line in rows} == {4}
        assert shown_commands(sections[tool])


def test_links_of_the_page_lead_somewhere() -> None:
    """Files beside the page, and the headings in them."""
    for name, heading in re.findall(r"\]\(([\w.]+\.md)(?:#([\w-]+))?\)", PAGE.read_text()):
        text = (PAGE.parent / name).read_text()
        titles = {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in text.splitlines()}
        assert not heading or heading in titles
