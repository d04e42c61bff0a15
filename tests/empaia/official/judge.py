"""What EMPAIA's own code says of app descriptions and bodies: JSON from stdin, verdicts to stdout (null: accepted).

Runs with the environment of setup.sh. Asked: ``[["ead", value], ["PostPolygonAnnotation", value], ...]``.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

from empaia_app_test_suite.py_ead_validation.py_ead_validation.ead_validator import validate_ead
from empaia_app_test_suite.py_ead_validation.py_ead_validation.exceptions import EadValidationError
from pydantic import TypeAdapter, ValidationError

MODULES = [
    *(f"annotation.{name}" for name in ("annotations", "classes", "collections", "pixelmaps", "primitives")),
    "job",
]


def adapter(name: str) -> TypeAdapter[Any]:
    """The official model ``name``."""
    for module in MODULES:
        found = import_module(f"empaia_app_test_suite.models.v3.{module}")
        if hasattr(found, name):
            return TypeAdapter(getattr(found, name))
    raise SystemExit(f"no official model is called {name}")


def verdict(what: str, value: Any) -> str | None:
    """Why ``value`` is refused; None when it is accepted. Models judge it as text and as parsed JSON."""
    try:
        if what == "ead":
            validate_ead(value)
        else:
            model = adapter(what)
            model.validate_json(json.dumps(value))
            model.validate_python(value)
    except (EadValidationError, ValidationError) as error:
        return " ".join(str(error).split())[:300]
    return None


if __name__ == "__main__":
    json.dump([verdict(what, value) for what, value in json.load(sys.stdin)], sys.stdout)
