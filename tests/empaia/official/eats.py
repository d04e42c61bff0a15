"""The real ``eats`` command line, with Docker replaced: ``python eats.py PORT ARGUMENTS...``.

PORT is where the platform's services answer (EMPAIA's own stand behind nginx in a container). Every image is here
already, containers can be removed. Runs with the environment of setup.sh.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import docker


def fake_docker(port: str) -> Any:
    """As much of Docker's client as the commands of eats ask for."""
    return SimpleNamespace(
        containers=SimpleNamespace(get=lambda name: SimpleNamespace(id=name, remove=lambda force=False: None)),
        api=SimpleNamespace(port=lambda container, inside: [{"HostPort": port}]),
        images=SimpleNamespace(list=lambda name: [name]),
    )


if __name__ == "__main__":
    services = fake_docker(sys.argv.pop(1))
    docker.from_env = lambda: services
    from empaia_app_test_suite.cli import app

    app(prog_name="eats")
