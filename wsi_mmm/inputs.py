"""Expand files, folders, patterns, prefixes and manifests to slides with ids."""

from __future__ import annotations

import codecs
import csv
import glob
import io
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from wsi_mmm.config import SlideSpec
from wsi_mmm.errors import InputError, ManifestError, NotFound, OptionError, SlideNotFound, StorageError
from wsi_mmm.options import positive_mpp
from wsi_mmm.plugins import plugin_names
from wsi_mmm.slides.dicom import is_dicom, is_other_dicom, one_per_series
from wsi_mmm.storage import store
from wsi_mmm.storage.patterns import match_uris

# fmt: off
SUFFIXES = frozenset((
    ".svs", ".tif", ".tiff", ".btf", ".tf2", ".tf8", ".ptif", ".ptiff", ".qptiff", ".ndpi", ".scn", ".mrxs", ".vms",
    ".vmu", ".bif", ".svslide", ".czi", ".dcm",
))
"""File names a directory or prefix is searched for; a slide named outright may be called anything."""

_IMAGES = frozenset((
    ".png", ".jpg", ".jpeg", ".bmp", ".jp2", ".j2k", ".vsi", ".isyntax", ".lif", ".zvi", ".nd2", ".oir", ".afi", ".sys",
))
# fmt: on
"""Suffixes of images that a folder is not searched for; the log says how many were passed over."""

_NOT_SLIDES = re.compile(r"\..*|@eaDir|#recycle|\$RECYCLE\.BIN|lost\+found|__MACOSX", re.IGNORECASE)
"""Folders that are not entered: hidden ones, and those that file servers and archives add."""

_log = logging.getLogger(__name__)

MANIFEST_SUFFIXES = (".csv", ".tsv")


_NO_VALUE = ("", "na", "n/a", "none", "null", "-")  # as R, pandas and people write it
_COLUMNS = {
    "slide": ("slide", "wsi", "image_path", "path", "slide_path", "uri", "filename"),
    "mpp": ("mpp", "spacing_at_level_0", "wsi_mpp", "slide_mpp"),
    "mask": ("mask_path", "mask", "tissue"),
    "id": ("sample_id", "slide_id", "id"),
    "scene": ("scene",),
}
"""Columns of a manifest by meaning; of several names the first counts."""


# ------------------------------------------------------------------------------------------------ inputs


def expand_inputs(
    inputs: Sequence[str | Path | SlideSpec], mpp: float | None = None, scene: int | None = None
) -> list[SlideSpec]:
    """Return every slide that ``inputs`` name, each with an id, in the order given, sorted inside a folder or pattern.

    An input is a slide (path or URI), a directory (searched recursively), a glob, an ``s3://`` (or other) prefix or
    pattern, or a manifest ``.csv``/``.tsv``. ``mpp`` and ``scene`` apply to the slides whose manifest row says nothing.

    A slide that is named outright is not checked here: if it is missing it fails alone and the others go on. What
    names many slides and finds none raises SlideNotFound; a manifest with a bad row raises ManifestError.
    """
    if mpp is not None:
        positive_mpp(mpp)
    specs = [spec for item in inputs for spec in _expand_one(item)]
    if not specs:
        raise SlideNotFound("no slides given; name files, folders, patterns or a manifest CSV")
    return unique_specs([
        replace(one, mpp=mpp if one.mpp is None else one.mpp, scene=scene if one.scene is None else one.scene)
        for one in specs
    ])  # fmt: skip


def _expand_one(item: str | Path | SlideSpec) -> Iterable[SlideSpec]:
    if isinstance(item, SlideSpec):
        return [item]
    uri = str(item)
    if not uri.strip():
        raise InputError("an empty slide name was given")
    if uri.lower().endswith(MANIFEST_SUFFIXES):
        return read_manifest(uri)
    found = _local_slides(_local_path(uri)) if store.is_local(uri) else _remote_slides(uri)
    return [SlideSpec(one) for one in found]


def _local_slides(path: str) -> list[str]:
    if os.path.isdir(path):
        return _files_below(path)
    if os.path.exists(path) or not glob.has_magic(path):
        return [path]  # a missing file fails alone, when it is opened
    found = filter(os.path.isfile, glob.glob(_escape_existing(path), recursive=True))
    return _require_slides(one_per_series(sorted(found)), f"no file matches {path}")


def _escape_existing(path: str) -> str:
    """Return a pattern in which folders that are there under just that name, such as ``run[1]``, mean themselves."""
    head, tail = os.path.split(path)
    if not tail or head == path:
        return path
    return os.path.join(glob.escape(head) if os.path.isdir(head) else _escape_existing(head), tail)


def _files_below(folder: str) -> list[str]:
    """Slides below ``folder``, linked folders included, each folder once; hidden folders and files are left out."""
    found: list[str] = []
    passed: Counter[str] = Counter()
    entered: set[str] = set()
    for base, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(base)
        folders[:] = [] if place in entered else sorted(name for name in folders if not _NOT_SLIDES.fullmatch(name))
        if place in entered:  # a link that leads back
            continue
        entered.add(place)
        for name in (name for name in names if not name.startswith(".")):
            path = os.path.join(base, name)
            if _is_slide_file(path):
                if _perhaps_dicom(name) and is_other_dicom(path):
                    passed["DICOM of other kinds"] += 1
                else:
                    found.append(path)
            elif PurePosixPath(name.lower()).suffix in _IMAGES:
                passed[PurePosixPath(name.lower()).suffix] += 1
    beside = f"; passed over: {_counted(passed)}" if passed else ""
    if found and passed:
        _log.warning("%s: images of other kinds were passed over: %s", folder, _counted(passed))
    slides = one_per_series(sorted(found))
    return _require_slides(slides, f"no slide in {folder} (looked for {_shown_suffixes()}{beside})")


def _is_slide_file(path: str) -> bool:
    """Return True for a file with a slide's suffix, or DICOM without one; never for a pipe, socket or device."""
    name = os.path.basename(path)
    if os.path.exists(path) and not os.path.isfile(path):
        return False
    if is_slide_name(name):
        return True  # a broken link too: it fails by name when it is opened
    return not re.search(r"[a-z]", PurePosixPath(name.lower()).suffix) and is_dicom(path)


def _perhaps_dicom(name: str) -> bool:
    return name.lower().endswith(".dcm") or not is_slide_name(name)


def _counted(suffixes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(suffixes.items()))


def _remote_slides(uri: str) -> list[str]:
    """A prefix (ends in ``/``, or no suffix of a slide) or a pattern is listed, unless there is an object of just that
    name; anything else, and a web address, is a slide."""
    if store.scheme_of(uri) in ("http", "https", "wsi"):
        return [uri]
    fixed = re.split(r"[*?\[]", uri, maxsplit=1)[0]
    if fixed != uri:
        return _matching_objects(uri, fixed)
    name = _file_name(uri)
    if "." in name and not uri.endswith("/") and (is_slide_name(name) or store.exists(uri)):
        return [uri]
    found = [name for name in store.list_uris(uri) if is_slide_name(name)]
    if not found and "." in name and not uri.endswith("/"):
        return [uri]  # it fails alone, when it is opened
    return _require_slides(found, f"no slide below {store.redact(uri)} (looked for {_shown_suffixes()})")


def _matching_objects(uri: str, fixed: str) -> list[str]:
    """The objects that a pattern matches, or the slides below the prefixes that it matches; ``fixed``: its text before
    the first sign of a pattern."""
    if fixed.count("/") < 3:
        raise InputError(f"{store.redact(uri)}: name the bucket; only what follows it can be a pattern")
    if not uri.endswith("/") and store.exists(uri):
        return [uri]
    found, below = match_uris(uri, store.list_uris(fixed[: fixed.rfind("/") + 1]))
    return _require_slides(
        found or [one for one in below if is_slide_name(one)], f"nothing matches {store.redact(uri)}"
    )


def _require_slides(found: list[str], otherwise: str) -> list[str]:
    if not found:
        raise SlideNotFound(otherwise)
    return found


def _shown_suffixes() -> str:
    return " ".join(sorted(_slide_suffixes()))


def _slide_suffixes() -> frozenset[str]:
    if not plugin_names("readers"):
        return SUFFIXES
    from wsi_mmm.slides.registry import plugin_suffixes  # with it come the readers

    return SUFFIXES | plugin_suffixes()


def is_slide_name(name: str) -> bool:
    """Return True if a file found in a folder is taken for a slide, by its suffix."""
    return PurePosixPath(name.lower()).suffix in _slide_suffixes()


# ------------------------------------------------------------------------------------------------ manifests


def read_manifest(uri: str) -> list[SlideSpec]:
    """The slides of a manifest CSV (or TSV), in its order; ids are as given, or empty.

    Headers of the tools in use are understood: ``slide,mpp`` | ``wsi,mpp`` |
    ``sample_id,image_path,mask_path,spacing_at_level_0`` | ``path,wsi_mpp,wsi_magnification``; others are ignored.
    Cells are separated by commas, semicolons (with decimal commas) or tabs; a first line ``sep=;`` is honoured. UTF-8,
    UTF-16 with its mark and Windows-1252 are read. Paths are relative to the manifest. A wrong row becomes a SlideSpec
    with an ``error`` that names row (the header is row 1) and column; a manifest that is wrong as a whole raises
    ManifestError.
    """
    name = _file_name(uri)
    delimiter, text = _find_delimiter(_manifest_text(uri, name), name)
    rows = csv.reader(io.StringIO(text), delimiter=delimiter)
    try:
        numbered = [(number, row) for number, row in enumerate(rows, start=1) if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise ManifestError(f"{name}: row {rows.line_num} is not CSV ({error})") from error
    if not numbered:
        raise ManifestError(f"{name} is empty; its first row names the columns, such as slide,mpp")
    header = [cell.strip() for cell in numbered[0][1]]
    columns = _find_columns(header, name)
    if len(numbered) == 1:
        raise ManifestError(f"{name} has a header and no slides")
    return [_row_spec(header, row, columns, (name, n, uri)) for n, row in numbered[1:]]


def _manifest_text(uri: str, name: str) -> str:
    """The manifest as text with line feeds, without mark, ``sep=`` line kept."""
    try:
        data = store.read_bytes(_local_path(uri) if store.is_local(uri) else uri)
    except NotFound as error:
        raise ManifestError(f"no manifest at {store.redact(uri)}") from error
    except StorageError as error:
        raise ManifestError(f"{name} cannot be read ({error})") from error
    return _decode_manifest(data, name).replace("\r\n", "\n").replace("\r", "\n")


def _decode_manifest(data: bytes, name: str) -> str:
    """Return text by its mark, as UTF-8, or as what Excel writes on Windows."""
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    for encoding in ("utf-16",) if marked else ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise ManifestError(f"{name} cannot be read as UTF-8, UTF-16 or Windows-1252 text; save it as CSV UTF-8")


def _find_delimiter(text: str, name: str) -> tuple[str, str]:
    """Return the separator of the cells and the text; a first line ``sep=;`` names it, and becomes empty."""
    first = text.split("\n", 1)[0].strip().strip('"')
    if first.lower().startswith("sep="):
        return first[4:5] or "\t", text[text.find("\n") :]
    header = next((line for line in text.split("\n") if line.strip(" ,;\t")), "")
    return max("\t,;" if name.lower().endswith(".tsv") else ",;\t", key=header.count), text


def _find_columns(header: Sequence[str], name: str) -> dict[str, str]:
    """Return the columns by meaning; names are compared without case, and spaces, dots and hyphens count as ``_``."""
    repeated = {cell for cell in header if cell and header.count(cell) > 1}
    if repeated:
        raise ManifestError(f"{name}: row 1: column {sorted(repeated)[0]!r} is there twice")
    lower = {re.sub(r"[\s.-]+", "_", cell.lower()): cell for cell in header}
    first = {meaning: next((n for n in names if n in lower), None) for meaning, names in _COLUMNS.items()}
    columns = {meaning: lower[column] for meaning, column in first.items() if column is not None}
    if "slide" not in columns:
        wanted, found = ", ".join(_COLUMNS["slide"]), ", ".join(header)
        raise ManifestError(f"{name}: row 1: no column names the slides; call it one of {wanted} (found: {found})")
    return columns


def _row_spec(
    header: Sequence[str], cells: Sequence[str], columns: Mapping[str, str], where: tuple[str, int, str]
) -> SlideSpec:
    """The slide of a row; a wrong row becomes a slide that fails with the reason and does not stop the others."""
    name, number, manifest = where

    def wrong(reason: str) -> SlideSpec:
        error = f"{name}: row {number}{reason}"
        return SlideSpec(manifest, f"{safe_id(stem(manifest))}-row-{number}", error=error)

    if any("\0" in cell for cell in cells):
        return wrong(" holds a zero byte; save the file again as CSV UTF-8")
    if any(cell.strip() for cell in cells[len(header) :]):
        return wrong(f" has {len(cells)} cells and the header {len(header)}; quote paths that hold commas")
    row = dict(zip(header, cells, strict=False))  # cells missing at the end are empty
    said = {meaning: row.get(column, "").strip() for meaning, column in columns.items()}
    if not said["slide"]:
        return wrong(f", column {columns['slide']!r}: empty; it names the slide")
    try:
        given = said.get("mpp", "").replace(",", ".")  # a decimal comma; thousands do not occur
        mpp = None if given.lower() in _NO_VALUE else positive_mpp(given)
    except OptionError as error:
        return wrong(f", column {columns['mpp']!r}: {error}")
    mask = _resolve_beside(said["mask"], manifest) if said.get("mask") else None
    chosen = "" if said.get("scene", "").lower() in _NO_VALUE else said["scene"]
    if chosen and not re.fullmatch(r"[0-9]{1,9}", chosen):
        return wrong(f", column {columns['scene']!r}: {chosen!r} is no number of an image, such as 0 (see 'info')")
    scene = int(chosen) if chosen else None
    return SlideSpec(_resolve_beside(said["slide"], manifest), said.get("id", ""), mpp, mask, scene=scene)


def _resolve_beside(uri: str, manifest: str) -> str:
    """``uri`` as seen from the folder of the manifest, unless it is absolute or has a scheme."""
    if not store.is_local(uri) or os.path.isabs(_local_path(uri)):
        return uri if not store.is_local(uri) else _local_path(uri)
    if not store.is_local(manifest):
        return manifest.rsplit("/", 1)[0] + "/" + uri
    path = os.path.normpath(os.path.join(os.path.dirname(_local_path(manifest)), uri))
    windows = path.replace("\\", "/")  # a relative path that was written on Windows
    return path if os.path.exists(path) or not os.path.exists(windows) else windows


def _local_path(uri: str) -> str:
    """The path of a local URI, ``~`` expanded."""
    return os.path.expanduser(store.local_path(uri))


# ------------------------------------------------------------------------------------------------ ids


def unique_specs(specs: Sequence[SlideSpec]) -> list[SlideSpec]:
    """The same slides with ids that are safe folder names and unique without regard to case.

    Slides that share a file name get the name of their folder and a short hash of their URI in front of it, so an id
    does not depend on the order of the inputs nor on how many others there are beside its namesakes. A scene that was
    chosen is part of the id. A slide that is named twice is kept once; a second, different demand on a slide becomes a
    spec with an error.
    """
    kept: dict[str, SlideSpec] = {}
    for number, spec in enumerate(specs):
        key = _slide_identity(spec)
        if spec.error:
            kept[f"{key}#{number}"] = spec
        elif replace(kept.setdefault(key, spec), uri=spec.uri) != spec:
            error = f"{store.redact(spec.uri)} is given twice with different id, mpp or mask; keep one"
            kept[f"{key}#{number}"] = SlideSpec(spec.uri, f"{_own_id(spec)}-again-{number}", error=error)
    ids = [_own_id(spec) for spec in kept.values()]
    namesakes = Counter(name.lower() for name in ids)
    return [
        replace(spec, id=_qualified_id(spec, name, key) if namesakes[name.lower()] > 1 else name)
        for (key, spec), name in zip(kept.items(), ids, strict=True)
    ]


def _own_id(spec: SlideSpec) -> str:
    """The id as given, or of the file's name and the scene."""
    chosen = "" if spec.scene is None else f"-scene-{spec.scene}"
    return safe_id(spec.id or stem(spec.uri) + chosen)


def _qualified_id(spec: SlideSpec, name: str, identity: str) -> str:
    if spec.id:
        raise ManifestError(f"the id {spec.id!r} is given to more than one slide; ids must differ")
    folder = safe_id(PurePosixPath(identity.partition("?")[0]).parent.name or "root")
    return f"{folder[:40]}-{name}-{sha256(identity.encode()).hexdigest()[:8]}"


def _slide_identity(spec: SlideSpec) -> str:
    place = os.path.abspath(_local_path(spec.uri)) if store.is_local(spec.uri) else spec.uri
    return place if spec.scene is None else f"{place}?scene={spec.scene}"


def stem(uri: str) -> str:
    """The file name without folders, query and suffix (``.ome.tiff`` counts as one)."""
    name = _file_name(uri)
    whole = re.sub(r"\.ome\.tiff?$", "", name, flags=re.IGNORECASE)
    return whole if whole != name else PurePosixPath(name).stem


def _file_name(uri: str) -> str:
    """The last part of the path. An object-store key may hold ``?`` and ``#``; in a web address they end the path."""
    if store.is_local(uri):
        return PurePosixPath(_local_path(uri)).name
    path = uri.partition("://")[2].partition("/")[2]
    if store.scheme_of(uri) in ("http", "https", "wsi"):
        path = unquote(re.split("[?#]", path, maxsplit=1)[0])
    return PurePosixPath(path).name


_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d|report)(\..*)?", re.IGNORECASE)


def safe_id(text: str) -> str:
    """``text`` as one folder name on any file system and in any object store: letters, digits, ``._-``, at most 120.

    What had to be changed to fit gets a hash of the original, so different texts never meet in one name.
    """
    name = re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII)[:120].strip("._ ")
    if name and name == text and not _RESERVED.fullmatch(name):
        return name
    start = "slide" if not name or _RESERVED.fullmatch(name) else name[:110].rstrip("._ ")
    return f"{start}-{sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def leads_away(output: str, name: str) -> str:
    """Why the results of the slide ``name`` would not lie in the folder ``output``; empty when they would."""
    if not store.is_local(output):
        return ""
    root = os.path.realpath(_local_path(output))
    place = os.path.realpath(os.path.join(root, name))
    if place == os.path.join(root, name):
        return ""
    return f"{os.path.join(output, name)} is a link that leads to {place}; remove it, or give the slide another id"
