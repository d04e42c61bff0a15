"""What the platform of the tests holds: objects that EMPAIA's own models accepted, jobs that its validator judges.

It is ours: what models and validator do not say (status codes, states that may follow each other) is a guess.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import requests
from empaia_app_test_suite.models.v3.annotation import annotations, classes, collections, pixelmaps, primitives
from empaia_app_test_suite.py_ead_validation.py_ead_validation.exceptions import JobValidationError
from empaia_app_test_suite.py_ead_validation.py_ead_validation.job_validator import JobValidator
from fastapi import HTTPException
from pydantic import TypeAdapter, ValidationError

MOST_ITEMS = 10_000
PATIENCE = 800  # seconds that an app may take
NEXT = {
    "ASSEMBLY": {"READY", "RUNNING"},
    "READY": {"SCHEDULED", "RUNNING"},
    "SCHEDULED": {"RUNNING"},
    "RUNNING": {"COMPLETED", "FAILED", "ERROR"},
}
Json = dict[str, Any]


def _models() -> dict[str, tuple[TypeAdapter[Any], TypeAdapter[Any]]]:
    """By type of object: the model of its post, and that of the stored one."""
    found = {}
    for module, ending in ((annotations, "Annotation"), (primitives, "Primitive"), (pixelmaps, "")):
        for kind in ("point", "line", "arrow", "circle", "rectangle", "polygon", "integer", "float", "bool", "string",
                     "continuous_pixelmap", "discrete_pixelmap", "nominal_pixelmap"):  # fmt: skip
            name = "".join(map(str.title, kind.split("_"))) + ending
            if hasattr(module, name):
                found[kind] = TypeAdapter(getattr(module, f"Post{name}")), TypeAdapter(getattr(module, name))
    found["class"] = TypeAdapter(classes.PostClass), TypeAdapter(classes.Class)
    found["collection"] = TypeAdapter(collections.PostCollection), TypeAdapter(collections.Collection)
    return found


MODELS = _models()
APP_COLLECTION = TypeAdapter(collections.PostCollectionApps)


def judged(model: TypeAdapter[Any], value: Any) -> Any:
    """``value`` if the model accepts it; 422 otherwise."""
    try:
        return model.dump_python(model.validate_python(value), mode="json", exclude_none=True)
    except ValidationError as error:
        raise HTTPException(422, [str(one["msg"]) for one in error.errors()[:3]]) from error


def of_type(item: Any, *, app: bool) -> Json:
    """A post if the model of its own type accepts it; 422 otherwise."""
    kind = item.get("type") if isinstance(item, dict) else None
    if kind not in MODELS:
        raise HTTPException(422, f"no object is a {kind}")
    return judged(APP_COLLECTION if app and kind == "collection" else MODELS[kind][0], item)


@dataclass
class Store:
    """Objects by id; ``members``: ids in collections; ``classes``: of annotations; ``seen``: what jobs did."""

    things: dict[str, Json] = field(default_factory=dict)
    members: dict[str, list[str]] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)
    tiles: dict[str, dict[tuple[int, int, int], bytes]] = field(default_factory=dict)
    slides: dict[str, Json] = field(default_factory=dict)
    cases: dict[str, Json] = field(default_factory=dict)
    apps: dict[str, Json] = field(default_factory=dict)
    jobs: dict[str, Json] = field(default_factory=dict)
    seen: dict[str, Json] = field(default_factory=dict)
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    commands: dict[str, list[str]] = field(default_factory=dict)
    wsi_service: str = ""
    port: int = 0

    def keep(self, item: Json) -> Json:
        """Store a post, and the items in it."""
        made, now = {**item, "id": item.get("id") or str(uuid.uuid4())}, int(time.time())
        if made["id"] in self.things:
            raise HTTPException(409, f"{made['id']} is there already")
        kind = made["type"]
        stamped = {"created_at": now, "updated_at": now} if kind.endswith("_pixelmap") or "npp_created" in made else {}
        items = made.pop("items", [])
        made |= stamped | ({} if kind.endswith("_pixelmap") else {"is_locked": False})
        MODELS[kind][1].validate_python(made)
        self.things[made["id"]] = made
        if kind == "class":
            self.classes.setdefault(made["reference_id"], []).append(made["id"])
        if kind == "collection":
            self.members[made["id"]] = [self.keep(one)["id"] for one in items]
        return self.shown(made["id"])

    def shown(self, thing: str, *, shallow: bool = False) -> Json:
        """An object as it is answered. 404 when there is none."""
        if thing not in self.things:
            raise HTTPException(404, "there is no such object")
        made = self.things[thing]
        if made["type"] == "collection":
            items = [] if shallow else [self.shown(one) for one in self.members[thing]]
            return {**made, "item_count": len(self.members[thing]), "items": items}
        if "npp_created" in made:
            return {**made, "classes": [self.things[one] for one in self.classes.get(thing, ())]}
        return made

    def add(self, collection: str, items: list[Json]) -> Json:
        """Add posts to a collection."""
        held = self.shown(collection, shallow=True)
        if len(items) > MOST_ITEMS:
            raise HTTPException(413, f"more than {MOST_ITEMS} items")
        if any(one["type"] != held["item_type"] for one in items):
            raise HTTPException(422, f"the collection holds items of type {held['item_type']}")
        kept = [self.keep(one) for one in items]
        self.members[collection] += [one["id"] for one in kept]
        return {"item_count": len(kept), "items": kept}

    def part(self, collection: str, skip: int, limit: int) -> Json:
        """Some items of a collection, and how many it has."""
        held = self.shown(collection, shallow=True)
        some = self.members[collection][skip : skip + min(limit, MOST_ITEMS)]
        return {"item_count": held["item_count"], "items": [self.shown(one) for one in some]}

    # ---------------------------------------------------------------------------------------------- jobs

    def job(self, job_id: str) -> Json:
        """400 when there is none."""
        if job_id not in self.jobs:
            raise HTTPException(400, "there is no such job")
        return self.jobs[job_id]

    def turn(self, job: Json, status: str, message: str | None = None) -> None:
        """Put a job into another state, 400 for one that cannot follow; validate its inputs, or its outputs."""
        if status not in NEXT.get(job["status"], ()):
            raise HTTPException(400, f"a job that is {job['status']} cannot become {status}")
        job["status"] = status
        job |= {"started_at": int(time.time())} if status == "RUNNING" else {}
        job |= {"ended_at": int(time.time()), "error_message": message} if status not in NEXT else {}
        if status in ("READY", "RUNNING") and job["input_validation_status"] == "NONE":
            self.begin(self.validate(job, "input"))
        if status == "COMPLETED":
            self.begin(self.validate(job, "output"))

    def begin(self, work: Any) -> None:
        """Do it beside what else happens."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def validate(self, job: Json, what: str) -> None:
        """The official validator's verdict on inputs or outputs."""
        job[f"{what}_validation_status"] = "RUNNING"
        validator = JobValidator(f"http://127.0.0.1:{self.port}/mds-api", _Http())
        check = validator.validate_inputs if what == "input" else validator.validate_outputs
        try:
            await check(dict(job), self.apps[job["app_id"]]["ead"])
            job[f"{what}_validation_status"] = "COMPLETED"
        except JobValidationError as error:
            job |= {f"{what}_validation_status": "ERROR", f"{what}_validation_error_message": str(error)}

    async def execute(self, job: Json, token: str) -> None:
        """Run the app as a process, where the platform would start a container."""
        while job["status"] == "READY":
            await asyncio.sleep(0.02)
        self.turn(job, "RUNNING")
        command, seen = self.commands[self.apps[job["app_id"]]["registry_image_url"]], self.seen[job["id"]]
        outside = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        app_api = f"http://127.0.0.1:{self.port}/app-api"
        told = {"EMPAIA_APP_API": app_api, "EMPAIA_JOB_ID": job["id"], "EMPAIA_TOKEN": token}
        process = await asyncio.create_subprocess_exec(
            *command, env={**outside, "OMP_NUM_THREADS": "1", **told}, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        self.processes[job["id"]] = process
        output, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
        seen |= {"exit": process.returncode, "output": output.decode(errors="replace")}
        if job["status"] == "RUNNING":
            self.turn(job, "ERROR", "the container ended without finalize or failure")


class _Http:
    """What the official validator asks the platform with."""

    async def get(self, url: str, **request: Any) -> Any:
        return await self._ask("GET", url, request)

    async def put(self, url: str, **request: Any) -> Any:
        return await self._ask("PUT", url, request)

    async def _ask(self, method: str, url: str, request: Json) -> Any:
        answer = await asyncio.to_thread(requests.request, method, url, timeout=60, **request)
        if not answer.ok:
            raise HTTPException(answer.status_code, answer.text)
        return answer.json()


store = Store()
