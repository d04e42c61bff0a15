"""deploy/empaia/Dockerfile without containers: what its container would start, and with which variables."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping

from helpers.compose import ROOT

DOCKERFILE = ROOT / "deploy" / "empaia" / "Dockerfile"


def instruction(name: str) -> str:
    """What follows the last ``name`` of the file, such as "USER"."""
    found: list[str] = re.findall(rf"^{name} (.+)$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    return found[-1]


def variables(**changed: str) -> dict[str, str]:
    """The image's variables; ``changed``: those of an image on top of it."""
    return {**dict(word.split("=", 1) for word in shlex.split(instruction("ENV"))), **changed}


def started(environment: Mapping[str, str]) -> list[str]:
    """The command that a container is, with its variables: `env NAME=VALUE ... ENTRYPOINT... CMD...`."""
    words = [*json.loads(instruction("ENTRYPOINT")), *json.loads(instruction("CMD"))]
    return ["env", *(f"{name}={value}" for name, value in environment.items()), *words]
