"""Synthetic slides and an S3 server as fixtures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from helpers.made_slides import board, copy_slide, small_slide
from helpers.moto import SECRET, moto_server

__all__ = ["board", "copy_slide", "small_slide"]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 server in this process; yields its endpoint."""
    with moto_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket, named by the environment of the AWS tools."""
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server, "AWS_ACCESS_KEY_ID": "wsikey", "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="slides")
    for item in client.list_objects_v2(Bucket="slides").get("Contents", []):
        client.delete_object(Bucket="slides", Key=item["Key"])
    return "s3://slides"
