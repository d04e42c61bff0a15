"""Slides of an EMPAIA job, over the App API v3: ``empaia://JOB_ID/INPUT_KEY``, INPUT_KEY being an input of type wsi.

``?image_format=jpeg`` (and ``image_quality=90``) asks for smaller, lossy pictures; else PNG. EMPAIA_APP_API and
EMPAIA_TOKEN are read here, where the slide is opened: on a cluster each worker has them of its own environment, and
EMPAIA_JOB_ID must name the same job there.

See `cuts` for how levels are cut into pictures.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from wsi_mmm.errors import ConfigError, OptionError, SlideDamaged, StorageError
from wsi_mmm.slides.service.client import ServiceClient, service_client
from wsi_mmm.slides.service.cuts import GRID_CUTS, RECTANGLE_CUTS
from wsi_mmm.slides.service.reader import PictureRoutes, ServiceReader
from wsi_mmm.storage.base import redact, split_address
from wsi_mmm.storage.remote import storage_timeout

SCHEME = "empaia"
_TIMEOUT = 300.0  # seconds: the platform itself waits as long for a picture
_PICTURES = {
    (): {"image_format": "png"},
    (("image_format", "png"),): {"image_format": "png"},
    (("image_format", "jpeg"),): {"image_format": "jpeg", "image_quality": "90"},
}
_ADVICE = "the job's token is not valid (any more); start the job again"


@dataclass(frozen=True, slots=True)
class _JobSlide:
    """A slide of a job: ``base`` is the base address of the job."""

    name: str
    base: str
    key: str
    query: str


def open_app_slide(uri: str) -> ServiceReader:
    """Open a slide of the job that this process works for. OptionError, SlideNotFound, SlideDamaged, StorageError."""
    place = _job_slide(uri, os.environ)
    parts = urlsplit(place.base)
    client = service_client(
        f"{parts.scheme}://{parts.netloc}", _job_token(os.environ), storage_timeout(otherwise=_TIMEOUT), _ADVICE
    )
    said = _fetch_input(place, client)
    cuts = GRID_CUTS if "image_format=jpeg" in place.query else RECTANGLE_CUTS
    return ServiceReader(said, _picture_routes(place, said), client, uri=place.name, cuts=cuts)


def _job_slide(uri: str, env: Mapping[str, str]) -> _JobSlide:
    name, parts = redact(uri), split_address(uri)
    job, key = parts.netloc, parts.path.strip("/")
    query = _PICTURES.get(tuple(parse_qsl(parts.query)))
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,50}", job) or not key or "/" in key or query is None:
        raise OptionError(f"{name} names no slide of a job; give empaia://JOB_ID/INPUT_KEY[?image_format=jpeg]")
    if env.get("EMPAIA_JOB_ID", "").strip() != job:
        raise ConfigError(f"{name}: EMPAIA_JOB_ID of this process is not that job; start workers for each job")
    api = env.get("EMPAIA_APP_API", "").strip().rstrip("/")
    if not re.fullmatch(r"https?://[^@{}\s?#]+", api):
        raise ConfigError("EMPAIA_APP_API is no http(s) address without a login")
    return _JobSlide(name, f"{api}/v3/{job}", quote(key, safe=""), urlencode(query))


def _job_token(env: Mapping[str, str]) -> str:
    token = env.get("EMPAIA_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError("EMPAIA_TOKEN is not set, or holds characters that no token has")
    return token


def _fetch_input(place: _JobSlide, client: ServiceClient) -> Mapping[str, Any]:
    """Fetch the input of type wsi."""
    said = client.get_json(f"{place.base}/inputs/{place.key}", name=place.name)
    if not isinstance(said, Mapping):
        raise StorageError(f"{place.name}: the App API's answer is no description of a slide")
    if not isinstance(said.get("id"), str) or not said["id"]:
        raise SlideDamaged(f"{place.name}: the App API describes a slide without an id")
    return said


def _picture_routes(place: _JobSlide, said: Mapping[str, Any]) -> PictureRoutes:
    slide = quote(said["id"], safe="")
    region = f"{place.base}/regions/{slide}/level/{{level}}/start/{{x}}/{{y}}/size/{{width}}/{{height}}"
    return PictureRoutes(region, f"{place.base}/tiles/{slide}/level/{{level}}/position/{{x}}/{{y}}", place.query)
