"""The secret of an S3 server, looked for wherever a run on a cluster leaves something behind."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers.moto import moto_server
from helpers.processes import BIN, dask_cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]  # botocore's own

SECRET, SIGNATURE = "Made-Up-Secret-of-S3", "Made-Up-Signature-of-a-link"


def scheduler_looker() -> Callable[..., list[bytes]]:
    """A function to be run on a scheduler, which has no tests to import: it travels whole."""

    def everything_known(dask_scheduler: Any) -> list[bytes]:
        """All its tasks with what they carry, its extensions' data and the metadata, pickled."""
        import cloudpickle

        things: list[Any] = [task.run_spec for task in dask_scheduler.tasks.values()]
        things += [task.annotations for task in dask_scheduler.tasks.values()]
        things += [dask_scheduler.task_metadata, dict(dask_scheduler.extensions["publish"].datasets)]
        return [cloudpickle.dumps(thing) for thing in things]

    return everything_known


IMPATIENT = """
from dataclasses import replace
from wsi_mmm.storage import retry

retry.OUTAGE = replace(retry.OUTAGE, seconds=5.0)
"""
"""For a worker: a server that is not there is waited for, as ever, but not for minutes."""


@contextmanager
def watching(look: Callable[[], None]) -> Iterator[None]:
    """``look`` every now and then, in a thread."""
    stop = threading.Event()

    def go() -> None:
        while not stop.wait(0.2):
            look()

    thread = threading.Thread(target=go)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_the_secret_is_nowhere(tiny_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the key of S3 nor the signature of a link is in logs, messages, reports, results, the cache, what the
    scheduler holds, or any process's command line, with slides that succeed and slides that fail. (What a manifest says
    of a slide travels to the workers: of a link its signature, too.)"""
    distributed = pytest.importorskip("distributed")
    boto3 = pytest.importorskip("boto3")
    graphs: set[bytes] = set()
    lines: set[str] = set()
    with moto_server() as endpoint:
        secrets = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": SECRET}
        for name, value in {**secrets, "AWS_REGION": "us-east-1", "WSI_MMM_STORAGE_TIMEOUT": "3"}.items():
            monkeypatch.setenv(name, value)  # the server of the link is not there: nobody need wait for it long
        s3 = boto3.client("s3", region_name="us-east-1")
        s3.create_bucket(Bucket="bucket")
        for key, data in (("good.tiff", tiny_slide.read_bytes()), ("bad.tiff", b"II*\0" + bytes(200))):
            s3.put_object(Bucket="bucket", Key=key, Body=data)
        link = f"http://user:{SIGNATURE}@127.0.0.1:9/slide.tiff?X-Amz-Signature={SIGNATURE}"
        (tmp_path / "m.csv").write_text(
            "\n".join(["slide", "s3://bucket/good.tiff", "s3://bucket/bad.tiff", "s3://bucket/none.tiff", link])
        )
        (tmp_path / "impatient.py").write_text(IMPATIENT)
        preload = ["--preload", tmp_path / "impatient.py"]
        with dask_cluster(tmp_path, preload) as address, distributed.Client(address, set_as_default=False) as client:
            everything_known = scheduler_looker()

            def look() -> None:
                graphs.update(client.run_on_scheduler(everything_known))
                for path in Path("/proc").glob("[0-9]*/cmdline"):
                    try:
                        lines.add(path.read_text(errors="replace"))
                    except OSError:  # it has ended
                        continue

            words = ["run", "m.csv", "-o", "out", "--task", "stain", "--cache", "cache", "--debug", "--json"]
            with watching(look):
                ended = subprocess.run(
                    [BIN / "wsi-mmm", *words, "--scheduler", address],
                    cwd=tmp_path, capture_output=True, timeout=600, check=False,
                )  # fmt: skip
                for more in (["info", link, "--debug"], ["info", "s3://bucket/bad.tiff", "--debug"]):
                    said = subprocess.run([BIN / "wsi-mmm", *more], capture_output=True, check=False, timeout=300)
                    assert SECRET.encode() not in said.stdout + said.stderr
                    assert SIGNATURE.encode() not in said.stdout + said.stderr
    assert ended.returncode not in (0, 2), ended.stderr  # one slide of four can be done
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "m.csv"]
    texts = {str(path.relative_to(tmp_path)): path.read_bytes() for path in files}
    assert {"cluster.log", "out/report.json", "out/report.html", "out/good/result.geojson.gz"} <= set(texts)
    assert len(graphs) > 10 and any(b"good.tiff" in graph or b"perform" in graph for graph in graphs)
    texts |= {"stdout": ended.stdout, "stderr": ended.stderr, "ps": "\n".join(lines).encode()}
    found = [name for name, text in texts.items() if SECRET.encode() in text]
    found += [name for name, text in texts.items() if SIGNATURE.encode() in text and name != "ps"]
    found += ["graph" for graph in graphs if SECRET.encode() in graph]
    assert found == []
