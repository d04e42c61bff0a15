"""Models that lie on storage: copied once to each machine, into a folder that is named by what they are. No torch."""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
from contextlib import closing
from pathlib import Path

from wsi_mmm.errors import ModelError, OutputError, WsiError
from wsi_mmm.model.card import CARD, WEIGHTS, parse_card
from wsi_mmm.storage import store
from wsi_mmm.storage.local import atomic_folder

MOST_CARD = 16 << 20
_CHUNK = 16 << 20

_lock = threading.Lock()
_known: dict[tuple[str, str], str] = {}


def fetch_model(name: str, cache: str | None) -> str:
    """The folder of a model that is named by a URI (``s3://bucket/model``); every other name as it is.

    Card and weights are copied into ``cache``/models (None: into a folder of its own in the system's temporary one),
    once for each process at most, and not at all where the same are there already. ModelError: the card is none, names
    no hash of its weights, or they have another one. StorageError, OutputError.
    """
    if "://" not in name:
        return name
    if store.is_local(name):
        return str(store.local_path(name))
    with _lock:
        if (name, str(cache)) not in _known:
            _known[name, str(cache)] = str(_copy_model(name, _model_cache(cache)))
        return _known[name, str(cache)]


def forget_model(name: str) -> None:
    """Look again where the model of that name lies when it is wanted next: it may be another one by now."""
    with _lock:
        for key in [key for key in _known if key[0] == name]:
            del _known[key]


def _model_cache(cache: str | None) -> Path:
    try:
        folder = Path(cache).expanduser() / "models" if cache else Path(tempfile.mkdtemp(prefix="wsi-mmm-models-"))
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"models cannot be kept in {cache}: {error}; set XDG_CACHE_HOME to another folder") from error
    return folder


def _copy_model(uri: str, folder: Path) -> Path:
    shown = store.redact(uri)
    try:
        with closing(store.open_store(store.join(uri, CARD))) as held:
            if held.size > MOST_CARD:
                raise ModelError(f"a card of {held.size} bytes is none")
            data = bytes(held.get_ranges([(0, held.size)])[0])
        raw = json.loads(data)
    except WsiError as error:
        raise ModelError(f"no model at {shown}: it has no {CARD} that can be read ({error})") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"the model card {shown}/{CARD} cannot be read as JSON: {error}") from error
    wanted = parse_card(raw, f"{shown}/{CARD}").weights_sha256
    if not wanted:
        raise ModelError(f"the card of {shown} names no weights_sha256: save the model again with this version")
    target = folder / hashlib.sha256(data).hexdigest()[:32]
    if (target / CARD).is_file() and (target / WEIGHTS).is_file():
        return target
    with atomic_folder(target, replace=False) as made:
        if _copy_object(store.join(uri, WEIGHTS), made / WEIGHTS) != wanted:
            raise ModelError(f"the weights of {shown} are not those its card was written for: copy the model again")
        (made / CARD).write_bytes(data)
    return target


def _copy_object(uri: str, path: Path) -> str:
    """The object into a file, a piece at a time; its sha256 hex."""
    digest = hashlib.sha256()
    with closing(store.open_store(uri)) as held, path.open("wb") as file:
        for start in range(0, held.size, _CHUNK):
            [chunk] = held.get_ranges([(start, min(_CHUNK, held.size - start))])
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()
