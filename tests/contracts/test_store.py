"""What every store does alike: the same tests for local files, HTTP, S3, fsspec, and JuiceFS where it is mounted."""

from __future__ import annotations

import os
import pickle
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from helpers.faulty import KINDS, Faulty
from helpers.moto import moto_server
from wsi_mmm.errors import ConfigError, NotFound, SlideChanged, StorageError
from wsi_mmm.slides import open_slide
from wsi_mmm.storage import store

SECRET = "very/secret+key"
DATA = np.random.default_rng(5).integers(0, 256, 3_000_000, np.uint8).tobytes()
RANGES = [(2_999_990, 50), (5, 10), (0, 0), (0, 20), (1_500_000, 700_000), (9, 4), (3_000_000, 5), (1_400_000, 200_000)]
SLICES = [DATA[start : start + length] for start, length in RANGES]


class Kind(NamedTuple):
    """A place for one object: its URI, how to put it there, and whether a change of it is seen."""

    uri: str
    put: Callable[[bytes], None]
    sees_changes: bool = True


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """An S3 server in this process; yields its endpoint."""
    with moto_server() as endpoint:
        yield endpoint


def _bucket(endpoint: str) -> str:
    import boto3

    name = f"wsi-mmm-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture
def s3(moto: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket on the server in this process; the environment names it."""
    for name, value in {
        "ENDPOINT_URL": moto,
        "ACCESS_KEY_ID": "k",
        "SECRET_ACCESS_KEY": SECRET,
        "REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    return _bucket(moto)


@pytest.fixture
def real_s3() -> str:
    """A new bucket on the server that the environment names."""
    if not os.environ.get("AWS_ENDPOINT_URL"):
        pytest.skip("no S3 server: AWS_ENDPOINT_URL is not set")
    return _bucket(os.environ["AWS_ENDPOINT_URL"])


SERVICES = [pytest.param(name, marks=pytest.mark.services) for name in ("rgw", "juicefs")]


@pytest.fixture(params=["local", "http", "signed-http", "s3", "memory", *SERVICES])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kind]:
    """Each kind of storage, without any object yet."""
    name: str = request.param
    if name in ("http", "signed-http"):
        files: dict[str, Path | bytes] = {}
        with Faulty(files=files) as web:
            query = "?X-Amz-Signature=hidden" if name == "signed-http" else ""
            yield Kind(f"{web.url}/a%20b.bin{query}", lambda data: files.__setitem__("/a b.bin", data))
        return
    if name in ("s3", "rgw"):
        uri = request.getfixturevalue("s3" if name == "s3" else "real_s3") + "/deep/a b#c.bin"
    elif name == "memory":
        uri = f"memory://{uuid.uuid4().hex}/a.bin"
    elif name == "juicefs":
        mount = os.environ.get("WSI_MMM_JUICEFS")
        if not mount:
            pytest.skip("no JuiceFS: WSI_MMM_JUICEFS is not set")
        uri = str(Path(mount) / uuid.uuid4().hex / "a.bin")
    else:
        uri = str(tmp_path / "a.bin")
    # A file that is replaced lives on under its descriptor: one version is read to its end, which is as good.
    yield Kind(uri, lambda data: store.write_bytes(uri, data), sees_changes=name in ("s3", "rgw"))


@pytest.fixture
def opened(kind: Kind) -> Iterator[store.ByteStore]:
    """An open store over DATA."""
    kind.put(DATA)
    found = store.open_store(kind.uri)
    yield found
    found.close()


def _bytes(found: list[Any]) -> list[bytes]:
    return [bytes(part) for part in found]


def test_every_range_gets_its_own_bytes(opened: store.ByteStore) -> None:
    """Unsorted, overlapping, empty, and beyond the end; as tuples or as an array; the size is known."""
    assert opened.size == len(DATA)
    assert _bytes(opened.get_ranges(RANGES)) == SLICES
    assert _bytes(opened.get_ranges(np.array(RANGES))) == SLICES
    assert opened.get_ranges([]) == []
    assert _bytes(opened.get_ranges([(4_000_000, 1), (7, 0)])) == [b"", b""]


def test_many_threads_read_at_once(opened: store.ByteStore) -> None:
    """Each gets what it asked for."""
    starts = list(range(0, 2_900_000, 50_000))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda start: bytes(opened.get_ranges([(start, 60_000)])[0]), starts))
    assert found == [DATA[start : start + 60_000] for start in starts]


def test_bytes_and_requests_are_counted(opened: store.ByteStore) -> None:
    """Near ranges are one request, far ones several; gaps count as read."""
    before = opened.counter.requests, opened.counter.bytes_read
    opened.get_ranges([(1_000_000, 100_000), (1_101_000, 100_000), (2_500_000, 1000)])
    assert opened.counter.requests - before[0] == 2
    assert opened.counter.bytes_read - before[1] == 202_000


def test_a_missing_object_is_not_found(kind: Kind) -> None:
    """The error shows the address without its query, and no secret."""
    with pytest.raises(NotFound) as caught:
        store.open_store(kind.uri)
    assert "hidden" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_object_has_no_bytes(kind: Kind) -> None:
    """Its size is 0 and any range of it is empty."""
    kind.put(b"")
    opened = store.open_store(kind.uri)
    assert opened.size == 0
    assert _bytes(opened.get_ranges([(0, 10)])) == [b""]
    opened.close()


def test_two_versions_are_never_mixed(kind: Kind) -> None:
    """After a replacement what is read is an error, or still the first version."""
    kind.put(DATA)
    opened = store.open_store(kind.uri)
    assert _bytes(opened.get_ranges([(900_000, 10)])) == [DATA[900_000:900_010]]
    kind.put(bytes(len(DATA) - 5))
    if kind.sees_changes or kind.uri.startswith("http"):
        with pytest.raises(SlideChanged, match="replaced"):
            opened.get_ranges([(900_000, 10)])
    elif not kind.uri.startswith("memory"):
        assert _bytes(opened.get_ranges([(900_000, 10)])) == [DATA[900_000:900_010]]
    opened.close()


def test_a_slide_reads_alike_from_anywhere(kind: Kind, tiny_slide: Path) -> None:
    """Same fingerprint, same pixels."""
    kind.put(tiny_slide.read_bytes())
    with open_slide(kind.uri) as there, open_slide(str(tiny_slide)) as here:
        assert there.info.fingerprint == here.info.fingerprint
        assert np.array_equal(there.read_region(100, 50, 900, 700), here.read_region(100, 50, 900, 700))


def test_a_closed_remote_store_says_so(s3: str) -> None:
    """Reading after close is an error in words."""
    store.write_bytes(f"{s3}/a", DATA)
    opened = store.open_store(f"{s3}/a")
    opened.close()
    with pytest.raises(StorageError, match="closed"):
        opened.get_ranges([(1_000_000, 10)])


# ------------------------------------------------------------------------------------------------------- faults
@pytest.mark.parametrize("query", ["", "?sig=hidden"])
@pytest.mark.parametrize("fault", KINDS)
def test_one_request_in_ten_failing_changes_nothing(fault: str, query: str) -> None:
    """Refused, reset, cut off or stalled: the bytes are the same, and stalled requests are not waited for."""
    with Faulty(files={"/a": DATA}, share=0.1, kinds=(fault,), stall=8.0, seed=3) as web:
        began = time.monotonic()
        for n in range(3):
            opened = store.open_store(f"{web.url}/a{query}")
            for start in range(n, 2_900_000, 100_000):
                assert bytes(opened.get_ranges([(start, 9000)])[0]) == DATA[start : start + 9000]
            opened.close()
        assert web.faults >= 3
        if fault != "stall" or not query:  # a blocking call cannot be left, only doubled
            assert time.monotonic() - began < 7.0


@pytest.mark.parametrize("query", ["", "?sig=hidden"])
@pytest.mark.parametrize("fault", KINDS)
def test_a_server_that_only_fails_is_given_up_in_time(fault: str, query: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what to check, no later than the configured time-out (and a little)."""
    monkeypatch.setenv("WSI_MMM_STORAGE_TIMEOUT", "1.5")
    with Faulty(files={"/a": DATA}, share=1.0, kinds=(fault,), stall=60.0) as web:
        began = time.monotonic()
        with pytest.raises(StorageError, match=r"check|try again") as caught:
            store.open_store(f"{web.url}/a{query}").get_ranges([(1_000_000, 10)])
        assert time.monotonic() - began < 2.5
        assert "\n" not in str(caught.value) and "hidden" not in str(caught.value)


def test_a_dead_endpoint_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens there: five seconds at most, whatever the time-out."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    began = time.monotonic()
    with pytest.raises(StorageError, match="AWS_ENDPOINT_URL") as caught:
        store.open_store("s3://bucket/a")
    assert time.monotonic() - began < 7.0
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "minio:9000",
        "localhost",
        "127.0.0.1:9000",
        "ftp://x",
        "http://",
        "https://bad host",
        "http://h:port",
        "http://h:99999",
        "http://h:0",
        "http://[::1",
        "http://ü:9",
        "http://<x>",
        "http://h?x=1",
        "http://h\n",
        "//h:9",
        "http://256.1.1.1:9",
    ],
)
def test_an_endpoint_that_is_no_address_is_named(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commonest slip is to leave out http://; the message shows how it is written."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with pytest.raises(ConfigError, match="write it as http://HOST:PORT") as caught:
        store.open_store("s3://bucket/a")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("status", ["403 Forbidden", "404 Not Found", "412 Precondition Failed", "416 Range"])
def test_what_will_not_change_is_asked_once(status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Denied, missing, changed and out of range are final."""
    asked: list[str] = []

    def refuse(self: Faulty, client: Any, head: Any, *, cut: bool) -> None:
        asked.append(head.method)
        client.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())

    with Faulty(files={"/a": DATA}) as web:
        opened = store.open_store(f"{web.url}/a")
        monkeypatch.setattr(Faulty, "_file", refuse)
        with pytest.raises(StorageError):
            opened.get_ranges([(1_000_000, 10)])
    assert asked == ["GET"]


def test_a_silent_request_is_sent_again_and_the_first_answer_counts() -> None:
    """A stall of 20 s costs less than one, and no more than one further request."""
    with Faulty(files={"/a": DATA}, stall=20.0) as web:
        opened = store.open_store(f"{web.url}/a")
        for n in range(12):
            opened.get_ranges([(500_000 + 1000 * n, 1000)])
        web.reset()
        web.share, web.kinds = 1.0, ("stall",)
        threading.Timer(0.03, lambda: setattr(web, "share", 0.0)).start()
        began = time.monotonic()
        assert bytes(opened.get_ranges([(900_000, 10)])[0]) == DATA[900_000:900_010]
        assert time.monotonic() - began < 1.0
        assert web.requests == 2


def test_requests_on_their_way_are_bounded() -> None:
    """Many threads asking for much do not open a socket each."""
    most = now = 0
    lock = threading.Lock()

    class Counting(Faulty):
        def _file(self, client: Any, head: Any, *, cut: bool) -> None:
            nonlocal most, now
            with lock:
                now += 1
                most = max(most, now)
            time.sleep(0.02)
            with lock:
                now -= 1
            super()._file(client, head, cut=cut)

    with Counting(files={"/a": DATA}) as web:
        opened = store.open_store(f"{web.url}/a")
        with ThreadPoolExecutor(24) as pool:
            list(pool.map(lambda n: opened.get_ranges([(n * 90_000, 5), (n * 50_000 + 9, 5)]), range(1, 30)))
    assert 4 <= most <= 16 + 8


def test_a_forked_process_is_told_to_be_spawned(s3: str) -> None:
    """The library's threads do not survive a fork; that is said at once, not after a time-out."""
    store.write_bytes(f"{s3}/a", DATA)
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking a process with threads: what is tested here
        child = os.fork()
    if child == 0:  # pragma: no cover - in the child
        try:
            store.open_store(f"{s3}/a")
            os.write(write, b"no error")
        except StorageError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert b"spawn" in os.read(read, 1000)


@pytest.mark.services
def test_a_real_server_behind_faults_gives_the_same_pixels(
    real_s3: str, tiny_slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request in ten fails in one of four ways; signatures hold through what lies between."""
    store.write_bytes(f"{real_s3}/a.tiff", tiny_slide.read_bytes())
    with (
        Faulty(os.environ["AWS_ENDPOINT_URL"], share=0.1, stall=10.0, seed=1) as web,
        open_slide(str(tiny_slide)) as here,
    ):
        monkeypatch.setenv("AWS_ENDPOINT_URL", web.url)
        for n in range(12):
            with open_slide(f"{real_s3}/a.tiff") as there:
                region = (60 * n, 40 * n, 600, 500)
                assert np.array_equal(there.read_region(*region), here.read_region(*region))
        assert web.faults >= 2


# ------------------------------------------------------------------------------------------------------- opening
def test_opening_costs_few_requests(tiny_slide: Path) -> None:
    """Header, directories and tables take four; two compare its level, a quarter as large, with it."""
    with Faulty(files={"/a.tiff": tiny_slide}, keep_log=True) as web, open_slide(f"{web.url}/a.tiff"):
        assert web.requests <= 4 + 2, web.log


@pytest.mark.parametrize("name", ["crohn_HE4_1.21Gpx.svs", "hpylori_giemsa.svs", "metaplasia_HE.svs",
                                  "metaplasia_trypsin_IHC.svs", "cmu-1-small-region.svs",
                                  "tcga-cr-7395-01a-01-ts1.svs"])  # fmt: skip
def test_opening_a_real_slide_costs_at_most_four_requests(real_data: Any, name: str) -> None:
    """Directories, tables and version, HEAD included; the fingerprint follows when it is asked for, once."""
    path = real_data.slide(name)
    with Faulty(files={"/a.svs": path}, keep_log=True) as web, open_slide(f"{web.url}/a.svs") as slide:
        assert web.requests <= 4, web.log
        with open_slide(str(path)) as near:
            assert slide.info.fingerprint == near.info.fingerprint
        assert web.requests <= 4 + 17
        assert pickle.loads(pickle.dumps(slide.info)) == slide.info
        assert web.requests <= 4 + 17
