"""docker-compose.yml without containers: what its services would run, and a private network in which they run it.

Every command, variable, port and host name is the file's own. Folders of containers become folders of a test, and users
and images are not looked at.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.processes import BIN, running

ROOT = Path(__file__).resolve().parent.parent.parent
_VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)(?:(:?-)([^}]*))?\})")


def load(env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The services, their variables replaced from ``env`` (None: left as they stand)."""
    text = (ROOT / "docker-compose.yml").read_text()
    found = yaml.safe_load(text)["services"]
    return dict(found if env is None else _interpolated(found, env))


def _interpolated(value: Any, env: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _interpolated(one, env) for key, one in value.items()}
    if isinstance(value, list):
        return [_interpolated(one, env) for one in value]
    return _VARIABLE.sub(lambda match: _replaced(match, env), value) if isinstance(value, str) else value


def _replaced(match: re.Match[str], env: Mapping[str, str]) -> str:
    """Compose's rules: ``$$`` is ``$``; ``:-`` also replaces what is empty."""
    escaped, name, rule, default = match.groups()
    if escaped:
        return "$"
    value = env.get(name)
    return (default or "") if value is None or (value == "" and rule == ":-") else value


@dataclass(frozen=True)
class Service:
    """A service as processes are started: its folders are ``folders``, container path -> path here."""

    name: str
    facts: Mapping[str, Any]
    env: Mapping[str, str]
    folders: Mapping[str, Path] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        """Entrypoint and command."""
        return [self._here(word) for word in [*self.facts["entrypoint"], *self.facts["command"]]]

    @property
    def environment(self) -> dict[str, str]:
        """What its process sees, and nothing of ours but the paths of programs."""
        handed_on = {
            name: self.env.get(name) if value is None else value for name, value in self.facts["environment"].items()
        }
        path = f"{BIN}:{ROOT / 'deploy'}:{os.environ['PATH']}"
        return {"PATH": path} | {name: self._here(value) for name, value in handed_on.items() if value is not None}

    @property
    def health(self) -> list[str]:
        """The health check as a command."""
        kind, *words = self.facts["healthcheck"]["test"]
        return [self._here(word) for word in (["sh", "-c", *words] if kind == "CMD-SHELL" else words)]

    def _here(self, text: str) -> str:
        for inside, outside in self.folders.items():
            text = re.sub(rf"(?<![\w/]){re.escape(inside)}(?![\w.-])", str(outside), text)
        return text


@dataclass(frozen=True)
class Network:
    """A network of its own, with loopback and the host names of services; ``pid`` holds it open."""

    pid: int

    def inside(self, command: Sequence[str | Path]) -> list[str]:
        """The command, to be run there."""
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "--wd=.", "--", *map(str, command)]

    def run(self, command: Sequence[str | Path], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Run it to its end with nothing but ``env``."""
        return subprocess.run(self.inside(command), env=dict(env), capture_output=True, text=True, timeout=280)

    def healthy(self, service: Service) -> bool:
        """Whether the service's own health check says so."""
        return self.run(service.health, service.environment).returncode == 0

    def wait(self, service: Service, log: Path, seconds: float = 90) -> None:
        """Wait until it is healthy."""
        stop = time.monotonic() + seconds
        while not self.healthy(service):
            assert time.monotonic() < stop, f"{service.name} is not healthy: {log.read_text(errors='replace')[-3000:]}"
            time.sleep(0.5)


@contextmanager
def network(folder: Path, names: Sequence[str]) -> Iterator[Network]:
    """A network namespace in which ``names`` are this machine; skips where none can be made (root on Linux can)."""
    hosts = folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {' '.join(names)}\n")
    script = 'ip link set lo up && mount --bind "$0" /etc/hosts && echo ready && exec sleep 1000'
    try:
        holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-c", script, str(hosts)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
    except OSError:
        pytest.skip("a private network needs unshare")
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != "ready\n":
            pytest.skip("a private network needs root on Linux")
        yield Network(holder.pid)
    finally:
        holder.terminate()
        holder.wait(10)
        assert holder.stdout is not None
        holder.stdout.close()


@contextmanager
def up(net: Network, service: Service, log: Path) -> Iterator[None]:
    """The service, from healthy to the end of the block; its process sees its environment and nothing else."""
    with running(net.inside(service.command), log, env=service.environment, bare=True):
        net.wait(service, log)
        yield
