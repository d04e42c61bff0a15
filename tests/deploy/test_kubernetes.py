"""What the files for Kubernetes promise, whoever applies them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from helpers.compose import ROOT, load


def documents() -> list[dict[str, Any]]:
    """Every object of every file."""
    files = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
    return [one for file in files for one in yaml.safe_load_all(file.read_text())]


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod's spec in an object, wherever it lies."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for one in value.values():
            yield from pods(one)


PODS = [pod for one in documents() for pod in pods(one)]


def test_the_kinds_are_those_of_the_operator() -> None:
    """A cluster with a group of GPU workers, a job with a cluster of its own, and the policy of their network."""
    kinds = [one["kind"] for one in documents()]
    assert kinds == ["DaskCluster", "DaskWorkerGroup", "DaskJob", "NetworkPolicy"]
    assert len(PODS) == 6


@pytest.mark.parametrize("pod", PODS, ids=lambda pod: pod["containers"][0]["name"])
def test_no_pod_has_privileges_or_a_secret(pod: dict[str, Any]) -> None:
    """Not root, nothing to escalate, a read-only file system, no token of the cluster; credentials by reference alone,
    and none for the scheduler."""
    [container] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    of_scheduler = ["DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH"] * (container["name"] == "scheduler")
    assert [one["name"] for one in container["env"]] == ["HOME", *of_scheduler]
    handed_on = [one["secretRef"]["name"] for one in container.get("envFrom", [])]
    assert handed_on == ([] if container["name"] == "scheduler" else ["wsi-mmm-storage"])


@pytest.mark.parametrize("pod", PODS, ids=lambda pod: pod["containers"][0]["name"])
def test_every_pod_asks_for_what_it_uses(pod: dict[str, Any]) -> None:
    """Processor and memory are asked for, memory is limited above what Dask may use; a GPU goes with its resource."""
    [container] = pod["containers"]
    words = [*container["command"], *container["args"]]
    resources = container["resources"]
    assert "cpu" in resources["requests"] and "memory" in resources["limits"]
    if "--memory-limit" in words:
        most = words[words.index("--memory-limit") + 1]
        assert int(most.removesuffix("GiB")) < int(resources["limits"]["memory"].removesuffix("Gi"))
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
    assert ("GPU=1" in words) == ("nvidia.com/gpu" in resources["limits"]) == (container["image"] == "wsi-mmm:gpu")


def test_commands_are_those_of_the_compose_file() -> None:
    """What was run as processes for one runs in the other: the same scheduler, and workers with the same options."""
    services = load({})
    for pod in PODS:
        [container] = pod["containers"]
        words = [*container["command"], *container["args"]]
        if container["name"] == "scheduler":
            assert words == services["scheduler"]["entrypoint"]
        elif container["name"] == "worker":
            same = services["worker" if container["image"] == "wsi-mmm:cpu" else "worker-gpu"]["entrypoint"]
            flags = {word for word in same if word.startswith("--")} - {"--death-timeout"}
            assert flags <= set(words)
            assert words[:3] == ["dask", "worker", "$(DASK_SCHEDULER_ADDRESS)"]
