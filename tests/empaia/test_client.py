"""The client against a platform that judges every body and fails when told to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from helpers.empaia_platform import TOKEN, FakePlatform, Fault
from wsi_mmm.config import EmpaiaJob, empaia_job
from wsi_mmm.empaia.bodies import Annotation, Collection, Point, Primitive, Wsi
from wsi_mmm.empaia.client import AppApi, Limits, Mode
from wsi_mmm.empaia.pixelmaps import MapLevel, Pixelmap, tile_bytes
from wsi_mmm.empaia.transport import Patience, Transport
from wsi_mmm.errors import ConfigError, OutputError, PlatformError

WSI = Wsi("b10648a7-340d-43fc-a2d9-4d91cc86f33f", 10_000, 10_000, 499.0)
QUICK = Patience(total=5.0, connect=2.0, attempts=3, pause=0.01)
Work = Callable[[FakePlatform, AppApi], Awaitable[Any]]


def _with(work: Work, *faults: Fault, limits: Limits | None = None, patience: Patience = QUICK, **told: Any) -> Any:
    async def both() -> Any:
        async with (
            FakePlatform(faults=list(faults), **told) as platform,
            AppApi(platform.job, limits, patience=patience) as api,
        ):
            return await work(platform, api)

    return asyncio.run(both())


def _points(count: int) -> list[Annotation]:
    return [Annotation("nucleus", Point(i % 100, i // 100), WSI, 499.0) for i in range(count)]


async def _post(platform: FakePlatform, api: AppApi, count: int = 7) -> list[list[str]]:
    collection = await api.post_output("nuclei_objects", Collection("point", name="nuclei"))
    found = [ids async for ids in api.post_items(collection, _points(count))]
    held = platform.items[collection]
    places = {item["id"]: item["coordinates"] for item in held}
    assert [places[one] for ids in found for one in ids] == [[i % 100, i // 100] for i in range(count)]
    assert len(held) == count
    return found


def test_a_job_from_mode_to_finalize() -> None:
    """Inputs are read, values, objects and tiles posted, progress said, and the job ends as COMPLETED."""

    async def work(platform: FakePlatform, api: AppApi) -> None:
        assert await api.mode() is Mode.standalone
        assert await api.configuration() == {"global": {}, "customer": {}}
        assert (await api.input("slide"))["id"] == WSI.id
        assert await api.region(WSI.id, 0, (-5, 0, 20, 30)) == b"600 px"
        await api.post_output("nuclei_count", Primitive("count", "integer", 7))
        heat = Pixelmap("heat", "continuous", "float32", WSI.id, (MapLevel(0),), limits=(0, 1))
        posted = await api.post_output("nuclei_heat", heat)
        await api.put_tile(heat, posted, (0, 1, 2), data=tile_bytes(heat, np.ones((3, 3))))
        await _post(platform, api)
        for done in (-1.0, 0.5, float("nan"), 2.0):
            await api.progress(done)
        await api.finalize()
        assert (platform.state, platform.progress, len(platform.tiles)) == ("COMPLETED", [0, 0.5, 0, 1], 1)

    _with(work, inputs={"slide": {"id": WSI.id}})


@pytest.mark.parametrize(("unpacks", "refused"), [(True, 0), (False, 1)])
def test_tiles_go_compressed_where_that_is_understood(unpacks: bool, refused: int) -> None:
    """The platform holds the tile's own bytes; one that does not unpack is asked once, then sent them as they are."""

    async def work(platform: FakePlatform, api: AppApi) -> None:
        heat = Pixelmap("heat", "continuous", "float32", WSI.id, (MapLevel(0),), limits=(0, 1))
        data, posted = tile_bytes(heat, np.eye(200)), await api.post_output("nuclei_heat", heat)
        before = platform.received
        for column in range(3):
            await api.put_tile(heat, posted, (0, column, 0), data=data)
        assert [platform.tiles[posted, 0, column, 0] for column in range(3)] == [data] * 3
        assert sum("/data" in line for line in platform.log) == 3 + refused
        assert (platform.received - before < len(data)) == unpacks

    _with(work, unpacks=unpacks)


def test_5000_objects_in_five_requests() -> None:
    """Objects go a thousand at a time."""

    async def work(platform: FakePlatform, api: AppApi) -> None:
        assert [len(ids) for ids in await _post(platform, api, 5000)] == [1000] * 5
        assert platform.posts == 5

    _with(work)


def test_batches_keep_to_the_bytes_of_a_request() -> None:
    """A request is no longer than the limit; an object that alone is longer is refused before it is sent."""

    async def work(platform: FakePlatform, api: AppApi) -> None:
        assert 2 <= len(await _post(platform, api, 7)) < 7  # each is accepted only if it is within 1000 bytes
        with pytest.raises(OutputError, match="bytes"):
            await api.post_output("other", Collection("point", tuple(_points(9))))

    _with(work, limits=Limits(body=1000), largest=1000)


def test_a_batch_too_large_for_the_platform_is_halved() -> None:
    """413 for a batch makes it two; 413 for one object is an error."""

    async def work(platform: FakePlatform, api: AppApi) -> None:
        assert len((await _post(platform, api, 7))[0]) == 7
        platform.largest = 10
        with pytest.raises(PlatformError, match="413"):
            await anext(api.post_items(next(iter(platform.items)), _points(1)))

    _with(work, largest=1000)


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("status", [0, 502, 503, 504])
def test_no_object_is_posted_twice(status: int, done: bool) -> None:
    """When the answer to a post is lost, what arrived is kept and what did not is sent again; ids stay in order."""
    _with(_post, Fault("/items", status, done=done))


@pytest.mark.parametrize("status", [0, 429, 502, 503, 504])
def test_reading_is_repeated(status: int) -> None:
    """Resets, 429 and 502 to 504 are tried again, as often as patience allows."""

    async def work(platform: FakePlatform, api: AppApi) -> int:
        await api.mode()
        return len(platform.log)

    assert _with(work, Fault("/mode", status, times=2, headers={"Retry-After": "0"})) == 3
    with pytest.raises(PlatformError):
        _with(work, Fault("/mode", status, times=99))


@pytest.mark.parametrize("status", [400, 401, 404, 422, 500])
def test_a_refusal_is_an_error_at_once(status: int) -> None:
    """Other refusals are a PlatformError with the status, after one request, and without the token they may quote."""

    async def work(platform: FakePlatform, api: AppApi) -> None:
        with pytest.raises(PlatformError, match=str(status)) as caught:
            await api.mode()
        assert caught.value.status == status and len(platform.log) == 1
        assert TOKEN not in repr(caught.value) and "***" in str(caught.value)

    _with(work, Fault("/mode", status))


def test_an_output_is_never_posted_twice() -> None:
    """A lost answer to the post of an output is an error: nobody can say whether it arrived."""

    async def work(platform: FakePlatform, api: AppApi) -> None:
        with pytest.raises(PlatformError, match="broke"):
            await api.post_output("count", Primitive("count", "integer", 7))
        assert len(platform.log) == 1

    _with(work, Fault("/outputs", done=True))


def test_silence_ends() -> None:
    """A platform that does not answer is an error after the time-out, never a hang."""
    patience = Patience(total=0.2, attempts=2, pause=0.01)
    with pytest.raises(PlatformError, match="within"):
        _with(lambda _, api: api.mode(), Fault("/mode", 200, times=2, wait=1.0), patience=patience)


def test_a_job_ends_once() -> None:
    """After finalize neither finalize nor failure is sent; after a finalize that was refused failure still is."""

    async def done(platform: FakePlatform, api: AppApi) -> None:
        await api.finalize()
        for again in (api.finalize(), api.failure("no")):
            with pytest.raises(RuntimeError, match="ended"):
                await again
        assert len(platform.log) == 1

    async def refused(platform: FakePlatform, api: AppApi) -> None:
        with pytest.raises(PlatformError):
            await api.finalize()
        await api.failure(f"The slide\ncannot be read {TOKEN} " + "x" * 300)
        assert platform.state == "FAILED" and len(platform.message) == 255
        assert TOKEN not in platform.message and platform.message.startswith("The slide cannot")

    _with(done)
    _with(refused, Fault("/finalize", 422))


@pytest.mark.parametrize("status", [0, 503])
def test_an_end_whose_answer_is_lost_is_an_end(status: int) -> None:
    """Said again, the platform refuses it, for the job has ended; where it had not arrived, it arrives now."""

    async def work(platform: FakePlatform, api: AppApi) -> None:
        await api.finalize()
        assert platform.state == "COMPLETED" and platform.log == ["PUT /finalize"] * 2

    _with(work, Fault("/finalize", status, done=True))
    _with(work, Fault("/finalize", status))


def test_what_the_platform_would_refuse_is_not_sent() -> None:
    """Regions of too many px and tiles of the wrong length are refused here."""

    async def work(platform: FakePlatform, api: AppApi) -> None:
        heat = Pixelmap("heat", "continuous", "float32", WSI.id, (MapLevel(0),), limits=(0, 1))
        for wrong in (api.region(WSI.id, 0, (0, 0, 5001, 5000)), api.put_tile(heat, "x", (0, 0, 0), data=b"1")):
            with pytest.raises(OutputError):
                await wrong
        assert platform.log == []

    _with(work)


def test_the_token_is_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    """Neither a repr nor the logs of all libraries hold the token, nor the chain of an error."""

    async def work(platform: FakePlatform, api: AppApi) -> str:
        with pytest.raises(PlatformError) as caught:
            await api.mode()
        error: BaseException | None = caught.value
        seen = [repr(api), repr(platform.job), repr(vars(api))]
        while error is not None:
            seen.append(repr(error))
            error = error.__context__
        return "".join(seen)

    with caplog.at_level(logging.DEBUG):
        assert TOKEN not in _with(work, Fault("/mode", times=99))
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("blanks", range(9_900, 10_001, 10))
def test_a_token_that_an_answer_quotes_is_cut_out(blanks: int) -> None:
    """Also where the part of a long answer that is read ends within it."""
    transport = Transport(EmpaiaJob("http://x", "j", "a" * 50 + "b" * 50), Patience())
    assert "aaa" not in transport.reason_of(b" " * blanks + b"a" * 50 + b"b" * 50 + b" and more" * 100)


def test_nobody_there() -> None:
    """An address where nothing listens is an error that says so, also for posts, which are then safe to repeat."""

    async def work() -> None:
        async with AppApi(EmpaiaJob("http://127.0.0.1:9", "j", TOKEN), patience=QUICK) as api:
            await api.post_output("count", Primitive("count", "integer", 7))

    with pytest.raises(PlatformError, match="cannot be reached"):
        asyncio.run(work())


@pytest.mark.parametrize(
    ("name", "value"),
    [("APP_API", ""), ("APP_API", "ftp://x"), ("APP_API", "http://u:p@x"), ("JOB_ID", "../x"), ("TOKEN", "a\nb")],
)
def test_a_job_comes_from_the_environment(name: str, value: str) -> None:
    """Three variables make a job; one that is missing or wrong is named, without its value."""
    good = {"EMPAIA_APP_API": "http://api/", "EMPAIA_JOB_ID": "j-1", "EMPAIA_TOKEN": TOKEN}
    job = empaia_job(good)
    assert (job.api, job.id, job.token) == ("http://api", "j-1", TOKEN) and TOKEN not in repr(job)
    with pytest.raises(ConfigError, match=f"EMPAIA_{name}"):
        empaia_job({**good, f"EMPAIA_{name}": value})
