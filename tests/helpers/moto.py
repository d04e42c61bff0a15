"""An S3 server in this process, for tests that need no real one."""

from __future__ import annotations

import threading
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

SECRET = "very/secret+key"


@contextmanager
def moto_server() -> Iterator[str]:
    """Start it; yield its endpoint; stop it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from moto.server import ThreadedMotoServer

        server = ThreadedMotoServer(port=0, verbose=False)
        server.start()
    host, port = server.get_host_and_port()
    # What a server holds is the process's own: without this, a later one has the buckets of an earlier one.
    with urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")):
        pass
    yield f"http://{host}:{port}"
    threading.Thread(target=server.stop).start()  # it looks for this twice a second: nobody need wait


@contextmanager
def moto_bucket(name: str, environment: pytest.MonkeyPatch) -> Iterator[str]:
    """That server with an empty bucket; the environment has its address and some keys. Yields the address."""
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("moto.server")
    with moto_server() as address:
        keys = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "REGION": "us-east-1"}
        for word, value in {"ENDPOINT_URL": address, **keys}.items():
            environment.setenv(f"AWS_{word}", value)
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=name)
        yield address
