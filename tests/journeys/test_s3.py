"""From S3 to S3: slide, cache and results in buckets, the same objects as on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import wsi_mmm
from wsi_mmm.slides import store


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server in this process (moto) with one bucket; the environment points at it."""
    moto, boto3 = pytest.importorskip("moto.server"), pytest.importorskip("boto3")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret-word")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="slides")
    yield "s3://slides"
    server.stop()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # botocore's own
def test_s3_in_s3_out_equals_disk(bucket: str, tiny_slide: Path, quiet_bytes: bytes, tmp_path: Path) -> None:
    """The GeoJSON on S3 is the one on disk, byte for byte; no secret is in what was written."""
    store.write_bytes(f"{bucket}/in/tiny.tiff", tiny_slide.read_bytes())
    report = wsi_mmm.run(f"{bucket}/in/tiny.tiff", output=f"{bucket}/out", cache=f"{bucket}/cache")
    [row] = report.slides
    assert row.status == "done", row.error
    assert store.read_bytes(f"{bucket}/out/tiny/result.geojson.gz") == quiet_bytes
    written = [store.read_bytes(f"{bucket}/out/{name}") for name in ("report.json", "report.html", "tiny/slide.json")]
    assert not any(b"very-secret-word" in data for data in written)
    again = wsi_mmm.run(f"{bucket}/in/tiny.tiff", output=tmp_path, cache=f"{bucket}/cache")
    assert again.slides[0].cache_hits == again.slides[0].tiles
    assert (tmp_path / "tiny" / "result.geojson.gz").read_bytes() == quiet_bytes
