"""The platform under the real ``eats`` keeps the limits, too: a client that breaks one is refused."""

from __future__ import annotations

import gzip
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from helpers.eats import SLIDE, Platform, said, write_inputs
from wsi_mmm.empaia import bodies
from wsi_mmm.empaia.bodies import Collection, Primitive, Record
from wsi_mmm.empaia.pixelmaps import MapLevel, Pixelmap

pytestmark = [pytest.mark.empaia, pytest.mark.timeout(300)]

NUMBER, HALF = Primitive("n", "integer", 7), Primitive("n", "float", 0.5)
MAP = Pixelmap("m", "continuous", "float32", SLIDE, (MapLevel(0, (0, 0, 19, 0)),), limits=(0, 1))
TILE = 256 * 256 * 4
MOST = 10_000
Ask = Callable[..., tuple[int, Any]]
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def registered(platform: Platform, folder: Any) -> dict[str, str]:
    """The variables of a new job, which does not run yet."""
    inputs = write_inputs(folder, SLIDE, [(100, 100, 300, 300)])
    return said(platform.eats("jobs", "register", platform.app("stand-in-sound"), inputs / "standalone"))


def asking(platform: Platform, job: dict[str, str]) -> Ask:
    """``ask(method, path, body)``: the status and the JSON of the answer of the job's App API."""

    def ask(method: str, path: str, body: Any = None, *, token: str | None = None, **headers: str) -> tuple[int, Any]:
        url = f"http://127.0.0.1:{platform.port}/app-api/v3/{job['EMPAIA_JOB_ID']}{path}"
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        told = {"Content-Type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}
        if token != "":
            told["Authorization"] = f"Bearer {job['EMPAIA_TOKEN'] if token is None else token}"
        try:
            with _OPENER.open(urllib.request.Request(url, data, told, method=method), timeout=60) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if text[:1] == b"{" else None
        except urllib.error.HTTPError as refused:
            return refused.code, None

    return ask


@pytest.fixture(scope="module")
def running(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ask, dict[str, Any]]:
    """A job that runs, and what was posted for it: a collection ``some`` and a pixelmap ``map`` of 20 tiles."""
    job = registered(platform, tmp_path_factory.mktemp("inputs"))
    assert platform.eats("jobs", "set-running", job["EMPAIA_JOB_ID"]).returncode == 0
    ask, made = asking(platform, job), {"job": job["EMPAIA_JOB_ID"]}
    for key, record in (("some", Collection("integer")), ("map", MAP)):
        status, kept = ask("POST", f"/outputs/{key}", bodies.body(record, made["job"]))
        assert status == 201
        made[key] = kept["id"]
    return ask, made


def items(job: str, count: int, record: Record = NUMBER) -> dict[str, Any]:
    return {"items": [bodies.body(record, job)] * count}


ROW = "/pixelmaps/{map}/level/0/position/start/0/0/end/{last}/0/data"
ONE = "/pixelmaps/{map}/level/0/position/%d/0/data"
CASES: dict[str, tuple[int, str, str, Callable[[str], Any], dict[str, str]]] = {
    "10,001 items": (413, "POST", "/collections/{some}/items", lambda job: items(job, MOST + 1), {}),
    "10,000 items": (201, "POST", "/collections/{some}/items", lambda job: items(job, MOST), {}),
    "10,001 in an output": (
        413, "POST", "/outputs/more",
        lambda job: {**bodies.body(Collection("integer"), job), **items(job, MOST + 1)}, {},
    ),
    "another type": (422, "POST", "/collections/{some}/items", lambda job: items(job, 1, HALF), {}),
    "10 MB and more": (413, "POST", "/collections/{some}/items", lambda _: b" " * 10_000_001, {}),
    "above 25 megapixels": (422, "GET", f"/regions/{SLIDE}/level/0/start/0/0/size/5001/5000", lambda _: None, {}),
    "17 tiles": (413, "PUT", ROW.replace("{last}", "16"), lambda _: bytes(17 * TILE), {}),
    "16 tiles": (204, "PUT", ROW.replace("{last}", "15"), lambda _: bytes(16 * TILE), {}),
    "15 as 16 tiles": (422, "PUT", ROW.replace("{last}", "15"), lambda _: bytes(15 * TILE), {}),
    "a byte too many": (422, "PUT", ONE % 0, lambda _: bytes(TILE + 1), {}),
    "a byte too few": (422, "PUT", ONE % 0, lambda _: bytes(TILE - 1), {}),
    "too few, packed": (422, "PUT", ONE % 0, lambda _: gzip.compress(bytes(9)), {"Content_Encoding": "gzip"}),
    "packed": (204, "PUT", ONE % 0, lambda _: gzip.compress(bytes(TILE)), {"Content_Encoding": "gzip"}),
    "a tile beyond": (404, "PUT", ONE % 20, lambda _: bytes(TILE), {}),
    "an output twice": (409, "POST", "/outputs/some", lambda job: bodies.body(Collection("integer"), job), {}),
    "no such collection": (404, "POST", f"/collections/{SLIDE}/items", lambda job: items(job, 1), {}),
    "a message of 256": (422, "PUT", "/failure", lambda _: {"user_message": "x" * 256}, {}),
    "progress of 2": (422, "PUT", "/progress", lambda _: {"progress": 2.0}, {}),
    "no token": (401, "GET", "/mode", lambda _: None, {"token": ""}),
    "a wrong token": (401, "PUT", "/finalize", lambda _: None, {"token": "header.other.signature"}),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_the_platform_keeps_its_limits(running: tuple[Ask, dict[str, Any]], what: str) -> None:
    """What breaks a limit is refused, what just keeps it is not."""
    (ask, made), (status, method, path, body, more) = running, CASES[what]
    for name in ("some", "map"):
        path = path.replace(f"{{{name}}}", made[name])
    assert ask(method, path, body(made["job"]), **more)[0] == status


def test_a_job_that_does_not_run_may_do_nothing(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Before it was started, and after it has ended: 409, whatever it asks for."""
    job = registered(platform, tmp_path_factory.mktemp("inputs"))
    ask, number = asking(platform, job), bodies.body(NUMBER, job["EMPAIA_JOB_ID"])

    def refused() -> set[int]:
        message = {"user_message": "no"}
        asked = [("GET", "/mode", None), ("POST", "/outputs/more", number), ("PUT", "/progress", {"progress": 0.5})]
        asked += [("GET", f"/regions/{SLIDE}/level/0/start/0/0/size/5/5", None), ("GET", "/inputs/slide", None)]
        return {ask(*one)[0] for one in [*asked, ("PUT", "/finalize", None), ("PUT", "/failure", message)]}

    assert refused() == {409}
    assert platform.eats("jobs", "set-running", job["EMPAIA_JOB_ID"]).returncode == 0
    assert ask("GET", "/mode") == (200, {"mode": "STANDALONE"})
    assert ask("PUT", "/failure", {"user_message": "The slide is not of tissue."})[0] == 204
    assert refused() == {409} and platform.job(job["EMPAIA_JOB_ID"])["status"] == "FAILED"
