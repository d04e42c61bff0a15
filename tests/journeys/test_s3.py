"""From S3 to S3: slide, cache and results in buckets, the same objects as on disk."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import wsi_mmm
from helpers.moto import moto_server
from wsi_mmm.errors import WsiError
from wsi_mmm.storage import store

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # botocore's own


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server in this process (moto) with one bucket; the environment points at it."""
    pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    with moto_server() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret-word")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="slides")
        yield "s3://slides"


@pytest.fixture
def real_bucket() -> str:
    """A new bucket on the server that the AWS variables name; see CONTRIBUTING.md."""
    boto3 = pytest.importorskip("boto3")
    if not os.environ.get("AWS_ENDPOINT_URL"):
        pytest.skip("no S3 server: AWS_ENDPOINT_URL is not set")
    name = f"wsi-mmm-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", region_name=os.environ.get("AWS_REGION", "us-east-1")).create_bucket(Bucket=name)
    return f"s3://{name}"


def journey(bucket: str, slide: Path, wanted: bytes, folder: Path) -> None:
    """S3 -> S3 with a cache on S3, then S3 -> disk from that cache: the objects are ``wanted`` both times."""
    store.write_bytes(f"{bucket}/in/tiny.tiff", slide.read_bytes())
    report = wsi_mmm.run(f"{bucket}/in/tiny.tiff", output=f"{bucket}/out", cache=f"{bucket}/cache")
    [row] = report.slides
    assert row.status == "done", row.error
    assert store.read_bytes(f"{bucket}/out/tiny/result.geojson.gz") == wanted
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    written = [store.read_bytes(f"{bucket}/out/{name}") for name in ("report.json", "report.html", "tiny/slide.json")]
    assert not any(secret in data for data in written)
    again = wsi_mmm.run(f"{bucket}/in/tiny.tiff", output=folder, cache=f"{bucket}/cache")
    assert again.slides[0].cache_hits == again.slides[0].tiles
    assert (folder / "tiny" / "result.geojson.gz").read_bytes() == wanted


def test_s3_in_s3_out_equals_disk(bucket: str, tiny_slide: Path, quiet_bytes: bytes, tmp_path: Path) -> None:
    """The GeoJSON on S3 is the one on disk, byte for byte; no secret is in what was written."""
    journey(bucket, tiny_slide, quiet_bytes, tmp_path)


@pytest.mark.services
def test_a_real_s3_server_gives_the_same(
    real_bucket: str, tiny_slide: Path, quiet_bytes: bytes, tmp_path: Path
) -> None:
    """What holds with the server in this process holds with a real one."""
    journey(real_bucket, tiny_slide, quiet_bytes, tmp_path)


@pytest.mark.services
def test_a_wrong_secret_is_one_line(real_bucket: str, tiny_slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real server refuses a wrong secret; the error says so in one line and does not repeat it."""
    store.write_bytes(f"{real_bucket}/tiny.tiff", tiny_slide.read_bytes())
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(WsiError) as error:
        wsi_mmm.open_slide(f"{real_bucket}/tiny.tiff")
    assert "\n" not in str(error.value)
    assert "not-the-secret" not in str(error.value)
