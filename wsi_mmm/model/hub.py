"""A look at the Hugging Face Hub before weights are asked for: what cannot be had is said in seconds, in one line.

The Hub's own client tries again and again, two and a half minutes for one file, before it says that nobody answers.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from wsi_mmm.errors import ModelError, first_line
from wsi_mmm.plugins import plugin_names

ANSWER_SECONDS = 6.0  # for all addresses of the Hub together
_WAYS_OUT = (
    "give a .safetensors file of them as weights, or download them where there is a network and set "
    "HF_HOME to that cache"
)


def check_hub(name: str) -> None:
    """Raise ModelError when the weights of the encoder ``name`` are not in the cache and the Hub cannot be asked."""
    if name in plugin_names("encoders"):
        return
    from huggingface_hub import constants

    repository = _hub_repository(name)
    if not repository or _is_cached(Path(constants.HF_HUB_CACHE), repository):
        return
    why = "HF_HUB_OFFLINE forbids to ask for them"
    if constants.HF_HUB_OFFLINE or (why := _connection_fault(constants.ENDPOINT)):
        raise ModelError(f"the weights of '{name}' are not on this machine and {why}; {_WAYS_OUT}")


def _hub_repository(name: str) -> str:
    """``owner/name`` of the repository that timm would download from; empty when it knows of none."""
    import timm

    scheme, colon, rest = name.partition(":")
    if colon:
        return rest.partition("@")[0] if scheme in ("hf-hub", "hf_hub") else ""
    known = timm.get_pretrained_cfg(name)
    return str(known.hf_hub_id or "") if known else ""


def _is_cached(cache: Path, repository: str) -> bool:
    """Whether the cache of downloads holds any weights of a repository."""
    folder = cache / f"models--{repository.replace('/', '--')}" / "snapshots"
    return any(path.suffix in (".safetensors", ".bin", ".pth") for path in folder.glob("*/*"))


def _connection_fault(endpoint: str) -> str:
    """Why no connection to ``endpoint``, or to the proxy in front of it, can be made; empty when one can."""
    parts = urlsplit(endpoint)
    proxy = getproxies().get(parts.scheme) if parts.hostname and not proxy_bypass(parts.hostname) else None
    place = urlsplit(proxy if proxy and "://" in proxy else f"http://{proxy}" if proxy else endpoint)
    host, port = place.hostname or "", place.port or (443 if place.scheme == "https" else 80)
    end, fault = time.monotonic() + ANSWER_SECONDS, "no time was left"
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return f"{host} cannot be found ({error.strerror or first_line(error)})"
    for family, kind, protocol, _, address in addresses:
        left = end - time.monotonic()
        if left <= 0:
            break
        with socket.socket(family, kind, protocol) as asked:
            asked.settimeout(min(left, ANSWER_SECONDS / 2))
            try:
                asked.connect(address)
            except OSError as error:
                fault = first_line(error)
            else:
                return ""
    return f"{host} does not answer ({fault})"
