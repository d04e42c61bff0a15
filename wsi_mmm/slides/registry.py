"""Choosing the reader of a slide: by its content, or as the user named it; never a silent second try."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from wsi_mmm.errors import NotASlide, NotFound, OptionError, PluginError, SlideDamaged, SlideNotFound
from wsi_mmm.plugins import load_plugin, plugin_names
from wsi_mmm.slides.base import Reader, ReaderPlugin, Slide, check_mpp
from wsi_mmm.slides.openslide import detect, open_with_openslide, open_with_tiffslide
from wsi_mmm.slides.service.app_api import SCHEME, open_app_slide
from wsi_mmm.slides.service.wsi_service import open_wsi_service
from wsi_mmm.slides.tiff.directories import Directory, is_tiff, read_directories
from wsi_mmm.slides.tiff.metadata import vendor_of
from wsi_mmm.slides.tiff.pages import find_slide_page
from wsi_mmm.slides.tiff.planes import perhaps_openslide, plane_of, unsupported
from wsi_mmm.slides.tiff.reader import TiffReader
from wsi_mmm.storage.base import is_service
from wsi_mmm.storage.store import BufferedStore, buffered, is_local, open_store, redact
from wsi_mmm.types import SlideInfo

_PLAIN = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF", b"RIFF": "WebP", b"BM": "BMP", b"%PDF": "PDF",
          b"PK\x03\x04": "ZIP", b"\x1f\x8b": "gzip"}  # fmt: skip


def open_slide(uri: str, mpp: float | None = None, reader: str | None = None, scene: int | None = None) -> Slide:
    """Open a slide at a path or URI; ``mpp`` overrides what it says of level 0, ``reader`` forces one by name.

    ``scene``: of a file that holds several images the one to read, by the number that ``properties`` and ``wsi-mmm
    info`` show. Raises SlideNotFound, NotASlide, SlideDamaged, StorageError, OptionError.
    """
    uri = str(uri)
    if mpp is not None:
        check_mpp(mpp)
    try:
        return Slide(_open_named(uri, reader, scene) if reader else _by_content(uri, scene), mpp)
    except NotFound as error:
        raise SlideNotFound(str(error)) from error


def _open_named(uri: str, reader: str, scene: int | None) -> Reader:
    open_reader = find_reader(reader)
    return _open_tiff(uri, scene) if open_reader is _open_tiff else _only_image(open_reader(uri), scene)


def _only_image(reader: Reader, scene: int | None) -> Reader:
    """Return the reader; OptionError when another image than its only one is asked for."""
    if not scene:
        return reader
    name = f"{reader.info.uri} (reader {reader.info.reader})"
    reader.close()
    raise OptionError(f"{name} has no scene {scene}: this reader gives one image of a file; choose no scene")


def find_reader(name: str) -> Callable[[str], Reader]:
    """Return the function that opens slides with the reader ``name``, ours or a plug-in's. OptionError, PluginError."""
    if name in READERS:
        return READERS[name]
    plugins = plugin_names("readers")
    if name in plugins:
        return partial(_open_with_plugin, name, reader_plugin(name))
    raise OptionError(f"there is no reader {name!r}; choose one of {', '.join((*READERS, *plugins))}")


def reader_plugin(name: str) -> ReaderPlugin:
    """Return the reader that an installed package offers as ``name``. PluginError when it is none."""
    if name in READERS:
        raise PluginError(f"a plug-in offers a reader by the name {name!r}, which is taken: give it another")
    plugin = load_plugin("readers", name)
    if not isinstance(plugin, ReaderPlugin):
        raise PluginError(f"the reader {name!r} of a plug-in is no wsi_mmm.slides.base.ReaderPlugin")
    return plugin


def _open_with_plugin(name: str, plugin: ReaderPlugin, uri: str) -> Reader:
    reader = plugin.open_reader(uri)
    info = getattr(reader, "info", None)
    if not isinstance(info, SlideInfo) or info.reader != name:
        got = f"a SlideInfo of {info.reader!r}" if isinstance(info, SlideInfo) else f"a {type(reader).__name__}"
        raise PluginError(f"the reader {name!r} of a plug-in gave {got}, not a Reader with SlideInfo.reader={name!r}")
    return reader


def plugin_suffixes() -> frozenset[str]:
    """Return the suffixes of the slides that readers of plug-ins open."""
    return frozenset(suffix for name in plugin_names("readers") for suffix in reader_plugin(name).suffixes)


def _by_content(uri: str, scene: int | None) -> Reader:
    if uri.startswith(f"{SCHEME}://"):
        return _only_image(open_app_slide(uri), scene)
    if uri.startswith("wsi://") or is_service(uri):
        return _only_image(open_wsi_service(uri), scene)
    store = buffered(open_store(uri))
    try:
        found = _examine_content(store, scene)
        if not isinstance(found, str):
            return TiffReader(store, found, scene=scene)
    except BaseException:
        store.close()
        raise
    store.close()
    return _only_image(find_reader(found)(uri), scene)


def _examine_content(store: BufferedStore, scene: int | None) -> str | list[Directory]:
    """Return the directories of a TIFF for our own reader, else a reader's name. Raises NotASlide, SlideDamaged."""
    name = redact(store.uri)
    if store.size == 0:
        raise NotASlide(f"{name} is empty (0 bytes); copy it again")
    head = bytes(store.read_ahead(0, 132))
    if not is_tiff(head):
        return _other_kind(store.uri, name, head)
    try:
        directories = read_directories(store)
    except (SlideDamaged, NotASlide):
        # NDPI beyond 4 GB bends the TIFF format: only its own vendor's reader knows how.
        if is_local(store.uri) and detect(store.uri) == "hamamatsu":
            return "openslide"
        raise
    vendor = vendor_of(directories[0])
    if vendor is not None:
        plane = plane_of(find_slide_page(directories, vendor, name, scene).directory, name)
        if not unsupported(plane) or not perhaps_openslide(plane):
            return directories
    return "openslide" if _seen_by_openslide(store.uri) else directories


def _other_kind(uri: str, name: str, head: bytes) -> str:
    for plugin in plugin_names("readers"):
        if reader_plugin(plugin).recognises(uri, head):
            return plugin
    plain = next((kind for magic, kind in _PLAIN.items() if head.startswith(magic)), None)
    if not is_local(uri):
        what = "DICOM" if head[128:132] == b"DICM" else plain or "no TIFF"
        raise NotASlide(f"{name} is {what}; only TIFF slides are read over the network: copy it to a local disk")
    # MRXS is a small JPEG beside a folder: ask OpenSlide before calling a JPEG a photo.
    if detect(uri) is not None:
        return "openslide"
    if plain in ("PNG", "JPEG", "GIF", "WebP", "BMP"):
        raise NotASlide(
            f"{name} is a plain {plain} image, not a slide; convert it to a pyramidal tiled TIFF "
            "(vips tiffsave in.png out.tif --tile --pyramid)"
        )
    what = f"a {plain} file" if plain else "of no format that a reader knows"
    raise NotASlide(f"{name} is {what}; give a slide (SVS, TIFF, OME-TIFF, NDPI, MRXS, DICOM, ...)")


def _seen_by_openslide(uri: str) -> bool:
    if not is_local(uri):
        raise NotASlide(f"{redact(uri)} is a TIFF that only OpenSlide reads, from local files; copy it to a disk")
    return detect(uri) is not None


def _open_tiff(uri: str, scene: int | None = None) -> Reader:
    store = buffered(open_store(uri))
    try:
        return TiffReader(store, scene=scene)
    except BaseException:
        store.close()
        raise


READERS: dict[str, Callable[[str], Reader]] = {
    "tiff": _open_tiff,
    "openslide": open_with_openslide,
    "tiffslide": open_with_tiffslide,
    "wsi-service": open_wsi_service,
}
