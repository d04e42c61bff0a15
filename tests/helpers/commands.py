"""The command line inside the process of a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from wsi_mmm.cli.main import app


def invoke(*arguments: str | Path) -> Result:
    """The result of ``wsi-mmm ARGUMENTS``; an exception that no command may let out fails the test."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def json_lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(text) for text in result.stdout.splitlines()]
