"""Slides behind an EMPAIA WSI service of v3: ``wsi://host[:port]/v3/slides/ID`` (over TLS) and ``https://`` likewise.

``?image_format=jpeg`` (and ``image_quality=90``) asks for smaller, lossy pictures; the default is PNG. ``plugin=NAME``
is handed to the service. WSI_MMM_SERVICE_TOKEN: the bearer token. WSI_MMM_SERVICE_HOST: the only hosts (``host`` or
``host:port``, commas between) that get it. Both are read here, where the service is opened, as those of object stores
are: on a cluster each worker has its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from wsi_mmm.errors import ConfigError, NotFound, OptionError, StorageError, WsiError
from wsi_mmm.slides.service.client import ServiceClient, service_client
from wsi_mmm.slides.service.info import storage_path
from wsi_mmm.slides.service.reader import PictureRoutes, ServiceReader
from wsi_mmm.storage.base import is_service, redact, split_address
from wsi_mmm.storage.remote import storage_timeout

_TIMEOUT = 300.0  # seconds: services may take as long for a picture
_FORMATS = ("png", "jpeg")
_KNOWN = ("image_format", "image_quality", "plugin")
_SHAPE = "give wsi://HOST/v3/slides/ID"
_ADVICE = "set WSI_MMM_SERVICE_TOKEN to a token that is valid for this service"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class ServiceAddress:
    """A slide of a service: ``slide`` is the base address of its resources, ``query`` goes with pictures."""

    name: str
    origin: str
    slide: str
    query: str

    def routes(self) -> PictureRoutes:
        """Return the addresses of pictures in a WSI service of v3."""
        region = "/region/level/{level}/start/{x}/{y}/size/{width}/{height}"
        return PictureRoutes(self.slide + region, self.slide + "/tile/level/{level}/tile/{x}/{y}", self.query)


def open_wsi_service(uri: str) -> ServiceReader:
    """Open a slide of a WSI service. Raises OptionError, SlideNotFound, SlideDamaged, StorageError."""
    address = parse_address(uri)
    seconds = storage_timeout(otherwise=_TIMEOUT)
    client = service_client(address.origin, _service_token(address, os.environ), seconds, _ADVICE)
    return ServiceReader(_fetch_info(address, client), address.routes(), client, uri=address.name)


def parse_address(uri: str) -> ServiceAddress:
    """Parse the URI of a slide. Raises OptionError for one that names no slide of a service, or holds a login."""
    name, parts = redact(uri), split_address(uri)
    if "@" in parts.netloc:
        raise OptionError(f"{name}: a login in the address would be shown; leave it out and {_ADVICE}")
    if not is_service(uri):
        raise OptionError(f"{name} names no slide of a WSI service; {_SHAPE}")
    scheme = "https" if parts.scheme == "wsi" else parts.scheme
    folder, _, slide = parts.path.rstrip("/").rpartition("/")
    origin = f"{scheme}://{_parse_host(parts, name)}"
    path = f"{quote(unquote(folder), safe='/')}/{quote(unquote(slide), safe='')}"
    return ServiceAddress(name, origin, origin + path, _picture_query(parts.query, name))


def _parse_host(parts: SplitResult, name: str) -> str:
    """Return host and port. Raises OptionError."""
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0 or not re.fullmatch(r"[A-Za-z0-9.-]+|[0-9a-f:.]+", parts.hostname or ""):
        raise OptionError(f"{name} names no host and port; {_SHAPE}")
    host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else str(parts.hostname)
    return f"{host}:{port}" if port else host


def _picture_query(text: str, name: str) -> str:
    """Return the query of every picture. Raises OptionError for unknown parameters."""
    given = dict(parse_qsl(text, keep_blank_values=True))
    unknown = next((key for key in given if key not in _KNOWN), None)
    if unknown is not None:  # not shown: it may be a secret
        raise OptionError(f"{name}: the address has a parameter that is not one of {', '.join(_KNOWN)}; leave it out")
    kind, quality = given.setdefault("image_format", "png"), given.get("image_quality", "90")
    if kind not in _FORMATS:
        raise OptionError(f"{name}: image_format is one of {', '.join(_FORMATS)}")
    if not re.fullmatch(r"100|[1-9]?[0-9]", quality):
        raise OptionError(f"{name}: image_quality is a number from 0 to 100")
    if kind == "jpeg":
        given["image_quality"] = quality
    return urlencode({key: given[key] for key in _KNOWN if key in given})


def _service_token(address: ServiceAddress, env: Mapping[str, str]) -> str | None:
    """Return the token for this service, or None. Raises ConfigError when it would be sent unencrypted."""
    token = (env.get("WSI_MMM_SERVICE_TOKEN") or "").strip()
    parts = urlsplit(address.origin)
    only = [host.strip().lower() for host in (env.get("WSI_MMM_SERVICE_HOST") or "").split(",") if host.strip()]
    if not token or (only and parts.netloc.lower() not in only and parts.hostname not in only):
        return None
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError("WSI_MMM_SERVICE_TOKEN holds characters that no token has; set it again")
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        raise ConfigError(
            f"{address.name}: over http:// the token of WSI_MMM_SERVICE_TOKEN could be read on the way; "
            "give the address as wsi:// or https://, or unset it"
        )
    return token


def _fetch_info(address: ServiceAddress, client: ServiceClient) -> object:
    """Fetch the service's description of the slide."""
    where = f"{address.slide}/info"
    plugin = urlencode([pair for pair in parse_qsl(address.query) if pair[0] == "plugin"])
    try:
        said: object = client.get_json(f"{where}?{plugin}" if plugin else where, name=address.name)
    except NotFound as error:
        raise _mapper_error(address, client) or error from None
    if said is None:
        raise StorageError(f"{address.name}: the service's answer is no JSON; is it a WSI service of v3?")
    return said


def _mapper_error(address: ServiceAddress, client: ServiceClient) -> WsiError | None:
    """Return the error for an address of a storage mapper, which knows paths of slides but has no pictures."""
    try:
        place = storage_path(client.get_json(address.slide, name=address.name))
    except WsiError:
        return None  # the first error says what is wrong
    if not place:
        return None
    shown = redact(place.splitlines()[0][:200])
    return StorageError(
        f"{address.name} is a storage mapper, not a WSI service; give the service's address, or the file ({shown})"
    )
