"""A platform in memory for the real ``eats`` and for apps: the routes of EMPAIA's services that they ask for.

Runs with the environment of setup.sh::

    python fake_platform.py PORT_FILE APPS SLIDES

PORT_FILE gets the port on loopback. APPS: JSON file, image -> command. SLIDES: a WSI service with the slides by id.
Besides the platform's services there is ``/seen/JOB``: what became of a job's process, and what it asked for.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import time
import uuid
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from empaia_app_test_suite.models.v3.annotation.collections import ItemQuery, PostItemList
from empaia_app_test_suite.models.v3.clinical import PostClinicalSlide
from empaia_app_test_suite.models.v3.job import Job, PostJob, PutJobStatus
from fake_app_api import app_api
from fake_store import NEXT, Json, judged, of_type, store
from fastapi import APIRouter, Body, FastAPI, HTTPException
from pydantic import TypeAdapter

ITEMS = TypeAdapter(PostItemList)
Said = Annotated[Any, Body()]
services = FastAPI()
mds = APIRouter(prefix="/mds-api")
others = APIRouter()

# ------------------------------------------------------------------------------------------------ data


@mds.get("/v3/cases/{case}")
async def read_case(case: str) -> Json:
    return found(store.cases, case)


@mds.post("/private/v3/cases")
async def post_case(case: Said) -> Json:
    store.cases[case["id"]] = case
    return case


@mds.put("/v3/examinations")
@mds.put("/v3/scopes")
async def put_examination(said: Said) -> Json:
    return {"id": str(uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(said, sort_keys=True))), **said}


@mds.put("/v3/examinations/{examination}/jobs/{job}/add")
async def add_job(examination: str, job: str) -> Json:
    return {"examination": examination, "job": job}


@mds.post("/private/v3/slides")
async def post_slide(slide: PostClinicalSlide) -> Json:
    made = slide.model_dump(mode="json")
    store.slides[made["id"]] = {**made, "deleted": False}
    return made


@mds.get("/v3/slides/{slide}")
async def read_slide(slide: str) -> Json:
    return found(store.slides, slide)


@mds.get("/private/v3/slides/{slide}/storage")
async def read_storage(slide: str) -> Json:
    path = str(found(store.slides, slide)["main_path"]).removeprefix("/data/")
    return {"slide_id": slide, "main_storage_address": {"path": path}, "secondary_storage_addresses": []}


def found(things: dict[str, Json], thing: str) -> Json:
    """400 for what there is not, as these services say it."""
    if thing not in things:
        raise HTTPException(400, "there is none")
    return things[thing]


@mds.post("/v3/annotations")
@mds.post("/v3/primitives")
@mds.post("/v3/classes")
@mds.post("/v3/collections")
async def post_thing(thing: Said) -> Json:
    return store.keep(of_type(thing, app=False))


@mds.post("/v3/collections/{collection}/items")
async def post_items(collection: str, posted: Said) -> Json:
    judged(ITEMS, posted)
    return store.add(collection, [of_type(one, app=False) for one in posted["items"]])


@mds.put("/v3/collections/{collection}/items/query")
async def query_items(collection: str, query: ItemQuery, skip: int = 0, limit: int = 10_000) -> Json:
    return store.part(collection, skip, limit)


@mds.get("/v3/{kind}/{thing}")
async def read_thing(kind: str, thing: str, shallow: bool = False) -> Json:
    return store.shown(thing, shallow=shallow)


# ------------------------------------------------------------------------------------------------ jobs

jobs = APIRouter(prefix="/mds-api/v3/jobs")


@jobs.post("")
async def post_job(posted: PostJob) -> Job:
    made = posted.model_dump(mode="json") | {"id": str(uuid.uuid4()), "created_at": int(time.time())}
    made |= {"status": "ASSEMBLY", "inputs": {}, "outputs": {}, "runtime": 0, "progress": None}
    made |= {f"{what}_validation_status": "NONE" for what in ("input", "output")}
    store.jobs[made["id"]] = made
    store.seen[made["id"]] = {"token": f"header.{uuid.uuid4().hex}.signature", "requests": []}
    return Job(**made)


@jobs.get("/{job}")
async def read_job(job: str) -> Job:
    return Job(**store.job(job))


@jobs.get("/{job}/token")
async def read_token(job: str) -> Json:
    return {"job_id": job, "access_token": store.seen[job]["token"]}


@jobs.put("/{job}/inputs/{key}")
async def put_input(job: str, key: str, said: Said) -> Job:
    store.job(job)["inputs"][key] = said["id"]
    return Job(**store.job(job))


@jobs.put("/{job}/status")
async def put_status(job: str, said: PutJobStatus) -> Job:
    store.turn(store.job(job), said.status.value, said.error_message)
    return Job(**store.job(job))


@jobs.put("/{job}/lock/{kind}/{thing}")
async def lock(job: str, kind: str, thing: str) -> Json:
    return found(store.slides, thing) if kind == "slides" else store.shown(thing, shallow=True)


# ------------------------------------------------------------------------------------------------ the other services


@others.get("/{service}/alive")
async def alive(service: str) -> Json:
    return {"status": "ok", "version": "0"}


@others.post("/aaa-api/api/v2/custom-mock/organization")
async def post_organization(said: Said) -> Json:
    return dict(said)


@others.post("/mps-api/v1/custom-mock/portal-apps")
async def post_app(said: Said) -> Json:
    app = said["active_app_views"]["v3"]["app"]
    store.apps[app["id"]] = app
    return dict(said)


@others.get("/mps-api/v1/customer/apps/{app}")
async def read_app(app: str) -> Json:
    return found(store.apps, app)


@others.post("/jes-api/v1/executions")
async def execute(said: Said) -> Json:
    store.begin(store.execute(store.job(said["job_id"]), said["access_token"]))
    return dict(said)


@others.put("/jes-api/v1/executions/{job}/stop")
async def stop(job: str) -> bool:
    process = store.processes.get(job)
    if process is None or process.returncode is not None:
        return False
    process.send_signal(signal.SIGTERM)
    return True


@others.get("/seen/{job}")
async def seen(job: str) -> Json:
    """What a job's process did; of a job that has ended, when its process has ended."""
    while job in store.processes and store.job(job)["status"] not in NEXT and "exit" not in store.seen[job]:
        await asyncio.sleep(0.05)
    tiles = {key: len(store.tiles.get(thing, {})) for key, thing in store.job(job)["outputs"].items()}
    return {**store.seen[job], "job": job, "tiles": {key: count for key, count in tiles.items() if count}}


for router in (app_api, jobs, mds, others):
    services.include_router(router)


def main(port_file: str, apps: str, slides: str) -> None:
    """Serve until the process is ended."""
    listening = socket.create_server(("127.0.0.1", 0))
    store.port, store.wsi_service = listening.getsockname()[1], slides
    store.commands = json.loads(Path(apps).read_text(encoding="utf-8"))
    started = Path(f"{port_file}.part")
    started.write_text(str(store.port), encoding="utf-8")
    started.rename(port_file)
    uvicorn.Server(uvicorn.Config(services, log_level="warning")).run([listening])


if __name__ == "__main__":
    main(*sys.argv[1:])
