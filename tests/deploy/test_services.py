"""The services of docker-compose.yml as plain processes: their own commands, variables, ports, names and checks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from helpers.compose import ROOT, Network, Service, load, network, up

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Network]:
    """A private network in which the services find each other by name."""
    with network(tmp_path, ["scheduler", "s3", "redis"]) as held:
        yield held


def service(name: str, env: dict[str, str], **folders: Path) -> Service:
    """One of the file's services; ``folders`` by the container's path."""
    return Service(name, load(env)[name], env, {f"/{inside}": outside for inside, outside in folders.items()})


def test_a_run_on_the_services_of_the_cluster(net: Network, tiny_slide: Path, tmp_path: Path) -> None:
    """Scheduler and worker of the profile `cluster` and the command line, healthy by their own checks: a slide is done
    as in one process. Without the worker, the scheduler is healthy and the worker's check says no."""
    env = {"WSI_MMM_THREADS": "1"}
    data, results, log = tmp_path / "data", tmp_path / "results", tmp_path / "log"
    data.mkdir()
    shutil.copy(tiny_slide, data / "slide.tiff")
    scheduler, worker, tool = (
        service(name, env, data=data, results=results) for name in ("scheduler", "worker", "wsi-mmm")
    )
    run = ["wsi-mmm", "run", f"{data}/slide.tiff", "--task", "stain", "-o"]
    with up(net, scheduler, log):
        assert not net.healthy(worker)
        with up(net, worker, log):
            ended = net.run([*run, results, "--scheduler", "tcp://scheduler:8786"], tool.environment)
            assert ended.returncode == 0, ended.stderr + ended.stdout
    alone = subprocess.run([*run, tmp_path / "alone"], env=tool.environment, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    there, here = (folder / "slide" / "result.geojson.gz" for folder in (results, tmp_path / "alone"))
    assert there.read_bytes() == here.read_bytes()


def test_a_worker_for_each_gpu(net: Network, tmp_path: Path) -> None:
    """The profile `gpu` starts one process for each GPU that the driver lists, which sees that GPU alone and has the
    resource GPU; nvidia-smi is a stand-in, no GPU is used. They end together."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    smi.chmod(0o755)
    log = tmp_path / "log"
    scheduler, gpus = service("scheduler", {}), service("worker-gpu", {"WSI_MMM_GPU_THREADS": "1"})
    env = {**gpus.environment, "PATH": f"{smi.parent}:{gpus.environment['PATH']}"}
    seen = Service("worker-gpu", {**gpus.facts, "environment": env}, {})
    ask = (
        "import json, os; from distributed import Client; c = Client('tcp://scheduler:8786');"
        "c.wait_for_workers(2, 60);"
        "see = c.run(lambda: os.environ['CUDA_VISIBLE_DEVICES']);"
        "print(json.dumps([[w['resources'], see[a]] for a, w in c.scheduler_info(n_workers=-1)['workers'].items()]))"
    )
    with up(net, scheduler, log):
        with up(net, seen, log):
            answer = net.run([sys.executable, "-c", ask], gpus.environment)
            assert answer.returncode == 0, answer.stderr
            assert sorted(json.loads(answer.stdout)) == [[{"GPU": 1.0}, "0"], [{"GPU": 1.0}, "1"]]
        gone = "from distributed import Client; print(len(Client('tcp://scheduler:8786').scheduler_info()['workers']))"
        assert net.run([sys.executable, "-c", gone], gpus.environment).stdout.strip() == "0"


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_redis_is_reached_by_password_alone(net: Network, tmp_path: Path) -> None:
    """Redis answers to who knows the password, shows it to nobody in `ps`, and does not start without one."""
    folder, log = tmp_path / "metadata", tmp_path / "log"
    folder.mkdir()
    secret = "only-in-the-environment"
    redis = service("redis", {"WSI_MMM_REDIS_PASSWORD": secret}, metadata=folder)
    with up(net, redis, log):
        stranger = {name: value for name, value in redis.environment.items() if name != "REDISCLI_AUTH"}
        assert "NOAUTH" in net.run(["redis-cli", "ping"], stranger).stdout
        assert not [line for line in command_lines() if secret in line]
        assert list(folder.rglob("*.aof"))
    assert secret not in log.read_text()
    refused = service("redis", {}, metadata=folder)
    ended = net.run(refused.command, refused.environment)
    assert ended.returncode != 0 and "set WSI_MMM_REDIS_PASSWORD" in ended.stderr


def test_the_s3_server_does_not_start_without_keys(net: Network) -> None:
    """Its image has keys that everybody knows; an empty environment must not mean these."""
    for env in ({}, {"AWS_ACCESS_KEY_ID": "someone"}):
        s3 = service("s3", env)
        ended = net.run(s3.command, s3.environment)
        assert ended.returncode != 0 and "set AWS_" in ended.stderr


def command_lines() -> list[str]:
    """Of every process of this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text(errors="replace"))
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.services
def test_juicefs_on_redis_and_s3(tmp_path: Path) -> None:
    """The profile `storage`: Redis and JuiceFS by their own commands, on the S3 server of deploy/services (another one
    than the file's image, at its address): what is written to the mount is there after it is mounted anew, and no
    command line shows a secret."""
    client = juicefs_client()
    with network(tmp_path, ["s3", "redis"]) as net, ExitStack() as stack:
        server = {
            "WSI_MMM_S3_DIR": str(tmp_path / "s3"),
            "WSI_MMM_S3_PORT": "9000",
            "PATH": os.environ["PATH"],
            "HOME": "/tmp",
        }
        script = ROOT / "deploy" / "services" / "s3.sh"
        started = net.run([script, "up"], server)
        stack.callback(lambda: net.run([script, "down"], server))
        if started.returncode == 75:
            pytest.skip(started.stderr)
        assert started.returncode == 0, started.stderr
        keys = dict(word.split("=", 1) for word in started.stdout.removeprefix("export ").split())
        env = {**keys, "WSI_MMM_REDIS_PASSWORD": "only-in-the-environment"}
        folders = {name: tmp_path / name for name in ("metadata", "juicefs", "cache")}
        for folder in folders.values():
            folder.mkdir()
        log = tmp_path / "log"
        redis = service("redis", env, **folders)
        there = {**folders, "juicefs-mount.sh": ROOT / "deploy" / "services" / "juicefs-mount.sh"}
        juicefs = service("juicefs", env, **there)
        path = f"{client.parent}:{juicefs.environment['PATH']}"
        juicefs = Service(
            "juicefs", {**juicefs.facts, "environment": {**juicefs.environment, "PATH": path}}, {}, juicefs.folders
        )
        note = folders["juicefs"] / "note"
        with up(net, redis, log):
            with up(net, juicefs, log):
                assert net.run(["sh", "-c", f"echo kept > {note}"], juicefs.environment).returncode == 0
                lines = command_lines()
                assert not [
                    line
                    for line in lines
                    if env["WSI_MMM_REDIS_PASSWORD"] in line or keys["AWS_SECRET_ACCESS_KEY"] in line
                ]
            assert not net.healthy(juicefs)
            with up(net, juicefs, log):
                assert net.run(["cat", note], juicefs.environment).stdout == "kept\n"


def juicefs_client() -> Path:
    """The client on PATH, or that which deploy/services/juicefs.sh installed beside its mount; skips without."""
    beside = Path(os.environ.get("WSI_MMM_JUICEFS") or "/nowhere").parent / "venv"
    found = shutil.which("juicefs") or next((str(path) for path in beside.rglob("juicefs/lib/juicefs")), None)
    if found is None or shutil.which("redis-server") is None or not Path("/dev/fuse").exists():
        pytest.skip("juicefs, redis-server or /dev/fuse is not here")
    return Path(found)
