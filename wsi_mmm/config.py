"""One slide as a user names it, settings files and the environment.

This is the only module that reads TOML and environment variables, except that object stores read their own where they
are opened. Nothing is read at import time.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from wsi_mmm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SlideSpec:
    """One slide to work on.

    ``id`` names its folder in the output: unique in a run, one path component, never ``.`` or ``..``; empty means that
    ``unique_specs`` chooses it. ``mpp`` overrides what the file says of itself (micrometres per level-0 px, above 0).
    ``mask`` is a GeoJSON or mask image that says where to look, in place of tissue detection. ``error``: the fault of
    its manifest row; such a slide fails alone, with this message. ``scene``: the number of the image to read, of a file
    that holds several.
    """

    uri: str
    id: str = ""
    mpp: float | None = None
    mask: str | None = None
    error: str = ""
    scene: int | None = None


def read_toml(path: str | Path) -> dict[str, object]:
    """Return the contents of a TOML file; ConfigError when it is missing or cannot be read."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"no settings file at {path}") from error
    except (OSError, RecursionError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not a readable TOML file ({error})") from error


def read_settings(path: str | Path, known: Iterable[str]) -> dict[str, object]:
    """Return the options of a flat TOML file; ConfigError names an unknown option or the fault of the file."""
    settings, names = read_toml(path), sorted(known)
    if unknown := sorted(set(settings) - set(names)):
        raise ConfigError(f"{path}: unknown option {unknown[0]!r}; options are {', '.join(names)}")
    return settings


STORAGE_VARIABLES = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION",
    "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ALLOW_HTTP", "WSI_MMM_STORAGE_TIMEOUT",
    "WSI_MMM_SERVICE_TOKEN", "WSI_MMM_SERVICE_HOST",
)  # fmt: skip
_SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSWORD")


def storage_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the object-store variables that are set; secrets show as ``set``, URLs without credentials."""
    shown = {}
    for name in STORAGE_VARIABLES:
        if value := environ.get(name):
            parts = urlsplit(value)
            plain = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" if parts.netloc else value
            shown[name] = "set" if _SECRET.search(name) else plain
    return shown


def user_cache(environ: Mapping[str, str] = os.environ) -> str:
    """Return the folder of files kept per user: in ``XDG_CACHE_HOME``, else in ``~/.cache`` (``~`` not expanded)."""
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return f"{base.rstrip('/')}/wsi-mmm"


def visible_gpus(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the NVIDIA GPUs that programs may use, as CUDA_VISIBLE_DEVICES names them (all, when it is not set)."""
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(name.strip() for name in named.split(",") if name.strip() not in ("", "-1"))
    return tuple(str(number) for number in range(sum(1 for _ in Path("/proc/driver/nvidia/gpus").glob("*"))))


def trace_exporter(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the exporter that OTEL_TRACES_EXPORTER names, or "otlp"; None for "none"."""
    name = environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    return None if name == "none" else name


def default_tls(scheduler: str | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the folder of certificates of ``WSI_MMM_TLS`` for a ``tls://`` scheduler; None without, and for others."""
    return environ.get("WSI_MMM_TLS") or None if (scheduler or "").startswith("tls://") else None


def default_cache(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the cache URI of ``WSI_MMM_CACHE``, or None: then a run keeps its cache beside its output."""
    return environ.get("WSI_MMM_CACHE") or None


@dataclass(frozen=True, slots=True)
class EmpaiaJob:
    """The job that the EMPAIA platform started this process for: address of its App API, id and token."""

    api: str
    id: str
    token: str = field(repr=False)


def empaia_job(environ: Mapping[str, str] = os.environ) -> EmpaiaJob:
    """Return the job that the ``EMPAIA_...`` variables name: APP_API, JOB_ID, TOKEN; ConfigError names the fault."""
    values = []
    for name in ("EMPAIA_APP_API", "EMPAIA_JOB_ID", "EMPAIA_TOKEN"):
        values.append(environ.get(name, "").strip())
        if not values[-1]:
            raise ConfigError(f"{name} is not set; the EMPAIA platform sets it when it starts an app")
    api, job_id, token = values
    if urlsplit(api).scheme not in ("http", "https") or "@" in urlsplit(api).netloc or not urlsplit(api).netloc:
        raise ConfigError("EMPAIA_APP_API is no http(s) address without a login")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,50}", job_id):
        raise ConfigError("EMPAIA_JOB_ID is no id of a job")
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError("EMPAIA_TOKEN holds characters that no token has")
    return EmpaiaJob(api.rstrip("/"), job_id, token)


def empaia_places(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the places of an app that are set: ``scheduler`` (``WSI_MMM_EMPAIA_SCHEDULER``), the address of a Dask
    cluster, and ``work`` (``WSI_MMM_EMPAIA_WORK``), the folder or URI of its intermediate files."""
    found = {name: environ.get(f"WSI_MMM_EMPAIA_{name.upper()}", "").strip() for name in ("scheduler", "work")}
    return {name: value for name, value in found.items() if value}
