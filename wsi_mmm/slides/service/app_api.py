"""Slides of an EMPAIA job, over the App API v3: ``empaia://JOB_ID/INPUT_KEY``, INPUT_KEY being an input of type wsi.

``?image_format=jpeg`` (and ``image_quality=90``) asks for smaller, lossy pictures; else PNG. EMPAIA_APP_API and
EMPAIA_TOKEN are read here, where the slide is opened: on a cluster each worker has them of its own environment, and
EMPAIA_JOB_ID must name the same job there.

How pictures are cut, lossless ones and others: `service_cuts`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from wsi_mmm.errors import ConfigError, OptionError, SlideDamaged, StorageError
from wsi_mmm.slides.service.client import Client, client
from wsi_mmm.slides.service.cuts import GridCuts, RectangleCuts
from wsi_mmm.slides.service.info import parsed
from wsi_mmm.slides.service.reader import Routes, ServiceReader
from wsi_mmm.storage.objects import timeout
from wsi_mmm.storage.ranges import Counter
from wsi_mmm.storage.uris import redact

SCHEME = "empaia"
_TIMEOUT = 300.0  # seconds: what the platform itself waits for a picture
_MOST_INPUT = 1 << 20  # bytes of a slide's description
_PICTURES = {
    (): {"image_format": "png"},
    (("image_format", "png"),): {"image_format": "png"},
    (("image_format", "jpeg"),): {"image_format": "jpeg", "image_quality": "90"},
}
_ADVICE = "the job's token is not valid (any more); start the job again"


@dataclass(frozen=True, slots=True)
class _Place:
    """A slide of a job: ``base`` is what every address of the job begins with."""

    name: str
    base: str
    key: str
    query: str


def open_app_slide(uri: str) -> ServiceReader:
    """Open a slide of the job that this process works for. OptionError, SlideNotFound, SlideDamaged, StorageError."""
    place = _place(uri, os.environ)
    parts = urlsplit(place.base)
    asker = client(f"{parts.scheme}://{parts.netloc}", _token(os.environ), timeout(otherwise=_TIMEOUT), _ADVICE)
    said = _described(place, asker)
    cuts = GridCuts() if "image_format=jpeg" in place.query else RectangleCuts()
    return ServiceReader(said, _routes(place, said), asker, uri=place.name, cuts=cuts)


def _place(uri: str, env: Mapping[str, str]) -> _Place:
    name, parts = redact(uri), urlsplit(uri)
    job, key = parts.netloc, parts.path.strip("/")
    query = _PICTURES.get(tuple(parse_qsl(parts.query)))
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,50}", job) or not key or "/" in key or query is None:
        raise OptionError(f"{name} names no slide of a job; give empaia://JOB_ID/INPUT_KEY[?image_format=jpeg]")
    if env.get("EMPAIA_JOB_ID", "").strip() != job:
        raise ConfigError(f"{name}: EMPAIA_JOB_ID of this process is not that job; start workers for each job")
    api = env.get("EMPAIA_APP_API", "").strip().rstrip("/")
    if not re.fullmatch(r"https?://[^@{}\s?#]+", api):
        raise ConfigError("EMPAIA_APP_API is no http(s) address without a login")
    return _Place(name, f"{api}/v3/{job}", quote(key, safe=""), urlencode(query))


def _token(env: Mapping[str, str]) -> str:
    token = env.get("EMPAIA_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError("EMPAIA_TOKEN is not set, or holds characters that no token has")
    return token


def _described(place: _Place, asker: Client) -> Mapping[str, Any]:
    """The input of type wsi."""
    url = f"{place.base}/inputs/{place.key}"
    said = parsed(asker.get_many([url], [_MOST_INPUT], name=place.name, counter=Counter())[0])
    if not isinstance(said, Mapping):
        raise StorageError(f"{place.name}: the App API's answer is no description of a slide")
    if not isinstance(said.get("id"), str) or not said["id"]:
        raise SlideDamaged(f"{place.name}: the App API describes a slide without an id")
    return said


def _routes(place: _Place, said: Mapping[str, Any]) -> Routes:
    slide = quote(said["id"], safe="")
    region = f"{place.base}/regions/{slide}/level/{{level}}/start/{{x}}/{{y}}/size/{{width}}/{{height}}"
    return Routes(region, f"{place.base}/tiles/{slide}/level/{{level}}/position/{{x}}/{{y}}", place.query)
