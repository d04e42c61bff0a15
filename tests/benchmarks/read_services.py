"""The real services that `make bench-read` reads from, named by the environment (deploy/services/with.sh)."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from read_peers import NotForThisError

FAULTY = Path(__file__).resolve().parents[1] / "helpers" / "faulty.py"


def put_on_services(options: argparse.Namespace, stack: ExitStack) -> None:
    """Put the slide on the S3 server and the JuiceFS mount that the environment names, unless told where it is."""
    if not options.s3 and os.environ.get("AWS_ENDPOINT_URL"):
        options.s3 = stack.enter_context(on_s3(options.slide))
    mount = os.environ.get("WSI_MMM_JUICEFS")
    if not options.juicefs and mount:
        copy = Path(mount) / f"bench-read-{os.getpid()}{Path(options.slide).suffix}"
        stack.callback(copy.unlink, missing_ok=True)
        shutil.copyfile(options.slide, copy)
        options.juicefs = str(copy)


@contextmanager
def on_s3(slide: str) -> Iterator[str]:
    """The URI of the slide in a bucket of its own, which is removed afterwards."""
    import boto3
    from botocore.config import Config

    client = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
    bucket, key = f"bench-read-{os.getpid()}", Path(slide).name
    client.create_bucket(Bucket=bucket)
    try:
        client.upload_file(slide, bucket, key)
        yield f"s3://{bucket}/{key}"
    finally:
        client.delete_object(Bucket=bucket, Key=key)
        client.delete_bucket(Bucket=bucket)


@contextmanager
def proxied(*, delay_ms: float = 0, share: float = 0) -> Iterator[None]:
    """S3 through a proxy, a process of its own, that delays answers or spoils a share; nothing asked: no proxy."""
    if not delay_ms and not share:
        yield
        return
    upstream = os.environ.get("AWS_ENDPOINT_URL")
    if not upstream:
        raise NotForThisError("AWS_ENDPOINT_URL must name the server that the proxy stands in front of")
    told = ["--upstream", upstream, "--delay", str(delay_ms), "--share", str(share)]
    running = subprocess.Popen([sys.executable, str(FAULTY), *told], stdout=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None
        os.environ["AWS_ENDPOINT_URL"] = running.stdout.readline().strip()
        yield
    finally:
        os.environ["AWS_ENDPOINT_URL"] = upstream
        running.terminate()
        running.wait()
