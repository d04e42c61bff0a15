"""Find the slide and its levels among the images of a TIFF: labels, scenes, channels, masks and pages lie there, too.

TIFF does not say it in one way: NewSubfileType (TIFF 6.0, tag 254), SubIFDs (330), OME-XML (TiffData), Aperio's and
PerkinElmer's descriptions each tell a part. What calls itself a level is one when its size fits; where nothing vouches
for it, ``Pyramid.doubtful`` names it and the reader compares its pixels with a finer level (see verify.py).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from wsi_mmm.errors import NotASlide, OptionError
from wsi_mmm.slides.tiff.directories import Directory
from wsi_mmm.slides.tiff.ome import OmeImage, ome_images
from wsi_mmm.slides.tiff.planes import Plane, plane_of, unsupported

_REDUCED, _MASK = 1, 4  # bits of NewSubfileType
_BESIDE = re.compile(r"label|macro|overview|thumbnail|barcode", re.IGNORECASE)
_QPI_TYPE = re.compile(r"<ImageType>([A-Za-z]{1,40})</ImageType>")
_QPI_NAME = re.compile(r"<Name>([^<]{1,80})</Name>")
_IMAGEJ_PAGES = re.compile(r"^(?:images|channels|slices)=(\d{1,6})", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Page:
    """One image of the file. ``number``: its directory, such as "2", or "0.1" for the second SubIFD of directory 0."""

    number: str
    directory: Directory
    parent: Directory | None = None

    @property
    def reduced(self) -> bool:
        """True for what calls itself a smaller version of another image."""
        return bool(self.directory.number(254, 0) & _REDUCED)

    @property
    def mask(self) -> bool:
        """True for a transparency mask."""
        return bool(self.directory.number(254, 0) & _MASK) or self.directory.number(262, -1) == 4

    @property
    def area(self) -> int:
        """Pixels."""
        return math.prod(self.size)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.directory.number(256, 0), self.directory.number(257, 0)


@dataclass(frozen=True, slots=True)
class SceneImage:
    """An image of the file that can be read as the slide. ``number``: of the OME image, else of its directory."""

    number: int
    page: Page
    ome: OmeImage | None = None


@dataclass(frozen=True, slots=True)
class Pyramid:
    """The slide's image, its candidate levels from fine to coarse, and every image of the file.

    ``numbers``: the directory of each plane. ``doubtful``: positions in ``planes`` of levels that only their size
    speaks for. ``scenes``: the images that can be read as the slide. ``usual``: ``top`` is the one that is read when
    nobody chooses.
    """

    top: SceneImage
    planes: tuple[Plane, ...]
    numbers: tuple[str, ...]
    doubtful: frozenset[int]
    pages: tuple[Page, ...]
    scenes: tuple[SceneImage, ...]
    usual: bool


def find_slide_page(directories: Sequence[Directory], vendor: str, name: str, scene: int | None = None) -> Page:
    """Return the image that is the slide at full resolution: the one of number ``scene``, or the usual one.

    Raises NotASlide for what is not one brightfield image, OptionError when there is no such scene.
    """
    return _find_top(_list_pages(directories), vendor, name, scene)[0].page


def find_pyramid(directories: Sequence[Directory], vendor: str, name: str, scene: int | None = None) -> Pyramid:
    """Choose the slide and its levels among the images of a file. Raises as `find_slide_page`, and for what cannot be
    read here."""
    pages = _list_pages(directories)
    chosen, scenes, usual = _find_top(pages, vendor, name, scene)
    top = chosen.page
    plane = plane_of(top.directory, name)
    why = unsupported(plane)
    if why:
        raise NotASlide(f"{name} is a TIFF that this reader cannot read: {why}")
    planes, numbers, sure, doubtful = [plane], [top.number], [plane], set()
    vendor = vendor if usual or vendor != "aperio" else "generic-tiff"  # Aperio's rules are those of its slide
    candidates = [page for page in pages if page is not top and _may_be_level(page, top, vendor)]
    sizes = Counter(page.size for page in candidates)
    for page in sorted(candidates, key=lambda page: -page.area):
        found = plane_of(page.directory, name)
        if not _fits(found, plane) or unsupported(found):
            continue
        if sizes[page.size] == 1 and _vouched(page, found, sure, vendor):
            sure.append(found)
        else:
            doubtful.add(len(planes))
        planes.append(found)
        numbers.append(page.number)
    return Pyramid(
        chosen, tuple(planes), tuple(numbers), frozenset(doubtful), tuple(pages), tuple(scenes), usual
    )  # fmt: skip


def _find_top(
    pages: Sequence[Page], vendor: str, name: str, wanted: int | None
) -> tuple[SceneImage, list[SceneImage], bool]:
    """Return the slide's scene, all scenes, and whether it is the usual one."""
    chain = [page for page in pages if page.parent is None]
    text = pages[0].directory.text(270)
    scenes = _ome_scenes(chain, text, name) if vendor == "ome" else []
    scenes = scenes or [SceneImage(int(page.number), page) for page in chain if not page.mask]
    if wanted is None:
        return _usual_scene(pages, scenes, vendor, name), scenes, True
    found = next((scene for scene in scenes if scene.number == wanted), None)
    if found is None:
        numbers = ", ".join(str(scene.number) for scene in scenes[:20])
        known = f"choose scene {numbers}" if len(scenes) > 1 else f"it holds one image, {numbers}: choose none"
        raise OptionError(f"{name} has no scene {wanted}; {known}")
    _check_chosen(pages, found, vendor, name)
    try:
        return found, scenes, _usual_scene(pages, scenes, vendor, name).page is found.page
    except NotASlide:  # nothing would be read unless somebody chose
        return found, scenes, False


def _usual_scene(pages: Sequence[Page], scenes: Sequence[SceneImage], vendor: str, name: str) -> SceneImage:
    """Return the scene that is read when nobody chooses. Raises NotASlide."""
    if scenes and scenes[0].ome is not None:
        return _ome_top(scenes, name)
    if vendor == "perkinelmer":
        top = _qpi_top(pages, name)
    else:
        top = pages[0] if vendor == "aperio" else _largest_page(pages)
        _check_channels(pages, top, pages[0].directory.text(270), name)
    return next((scene for scene in scenes if scene.page is top), SceneImage(int(top.number), top))


def _check_chosen(pages: Sequence[Page], scene: SceneImage, vendor: str, name: str) -> None:
    """Refuse a channel that the file names as one, chosen or not; other grey pages may be chosen."""
    grey, text = scene.page.directory.number(277, 1) < 3, pages[0].directory.text(270)
    if scene.ome is not None:
        if grey and scene.ome.planes > 1:
            raise NotASlide(_channels_text(name, scene.ome.planes, scene.ome.channels))
    elif grey and vendor == "perkinelmer" and _qpi_type(scene.page) == "FullResolution":
        _qpi_top(pages, name)
    elif grey and text.startswith("ImageJ="):
        _check_channels(pages, scene.page, text, name)


def _list_pages(directories: Sequence[Directory]) -> list[Page]:
    pages = []
    for number, directory in enumerate(directories):
        pages.append(Page(str(number), directory))
        pages += [Page(f"{number}.{n}", sub, directory) for n, sub in enumerate(directory.sub)]
    return pages


def _largest_page(pages: Sequence[Page]) -> Page:
    """The largest image of the main chain that is neither reduced nor a mask; tiled ones before strips."""
    chain = [page for page in pages if page.parent is None]
    whole = [page for page in chain if not page.reduced and not page.mask] or chain
    tiled = [page for page in whole if 322 in page.directory.entries]
    return max(tiled or whole, key=lambda page: page.area)


def _check_channels(pages: Sequence[Page], top: Page, text: str, name: str) -> None:
    """Refuse stacks of grey images: they are channels, and the first of them is no slide."""
    if top.directory.number(277, 1) != 1 or top.directory.number(262, -1) not in (0, 1):
        return
    alike = [
        page for page in pages
        if page.parent is top.parent and not page.mask and page.size == top.size and page.directory.number(277, 1) == 1
    ]  # fmt: skip
    stacked = [int(n) for n in _IMAGEJ_PAGES.findall(text[:65536])] if text.startswith("ImageJ=") else []
    if len(alike) > 1 or max(stacked, default=1) > 1:
        choice = "" if stacked else f", or choose one of them: scene {', '.join(p.number for p in alike[:20])}"
        raise NotASlide(_channels_text(name, max(len(alike), *stacked, 1), ()) + choice)


def _channels_text(name: str, count: int, channels: Sequence[str]) -> str:
    named = f" ({', '.join(channels[:8])})" if any(channels) else ""
    return (
        f"{name} holds {count} grey images of one size{named}: fluorescence channels or a stack, not a brightfield RGB "
        "slide; convert the wanted view to RGB"
    )


def _qpi_top(pages: Sequence[Page], name: str) -> Page:
    """The full-resolution image of a QPTIFF (PerkinElmer, Akoya); several are channels."""
    chain = [page for page in pages if page.parent is None]
    full = [page for page in chain if _qpi_type(page) == "FullResolution"] or chain[:1]
    if len(full) > 1 or full[0].directory.number(277, 1) == 1:
        found = (_QPI_NAME.search(page.directory.text(270)) for page in full)
        raise NotASlide(_channels_text(name, len(full), [match[1] for match in found if match]))
    return full[0]


def _qpi_type(page: Page) -> str:
    found = _QPI_TYPE.search(page.directory.text(270)[:65536])
    return found[1] if found else ""


def _ome_scenes(chain: Sequence[Page], text: str, name: str) -> list[SceneImage]:
    """The images that OME-XML describes and the file holds, of one directory the first; none when it cannot be read."""
    images = ome_images(text, name)
    found: dict[int, SceneImage] = {}
    for number, image in enumerate(images):
        if image.ifd is not None and image.ifd < len(chain):
            found.setdefault(image.ifd, SceneImage(number, chain[image.ifd], image))
    if images and not found:
        raise NotASlide(f"{name} is an OME-TIFF whose pixels lie in other files; give the file that holds them")
    return sorted(found.values(), key=lambda scene: scene.number)


def _ome_top(scenes: Sequence[SceneImage], name: str) -> SceneImage:
    """The largest brightfield image that OME-XML describes; a label is one only if there is no other."""
    here = [(scene, scene.ome) for scene in scenes if scene.ome is not None]
    colour = [(scene, ome) for scene, ome in here if scene.page.directory.number(277, 1) >= 3 or ome.planes == 1]
    if not colour:
        raise NotASlide(_channels_text(name, here[0][1].planes, here[0][1].channels))
    slides = [scene for scene, ome in colour if not _BESIDE.search(ome.name)] or [scene for scene, _ in colour]
    return max(slides, key=lambda scene: scene.page.area)


def _may_be_level(page: Page, top: Page, vendor: str) -> bool:
    """Tell by flags and kind, not yet by size."""
    directory = page.directory
    if page.mask or directory.number(262, -1) != top.directory.number(262, -1):
        return False
    if (322 in directory.entries) != (322 in top.directory.entries):
        return False
    if page.parent is not None:
        return page.parent is top.directory
    if vendor == "aperio":
        return directory.number(254, 0) in (0, _REDUCED)  # the macro is flagged 9, and the label 1, as some levels are
    if vendor == "perkinelmer":
        return _qpi_type(page) == "ReducedResolution"
    # A thumbnail is stored in strips too: among strips only what calls itself a reduced image is a level.
    return 322 in directory.entries or page.reduced


def _fits(plane: Plane, top: Plane) -> bool:
    """A level is smaller than the slide; rounding moves either side by up to a pixel per halving, two are granted."""
    if plane.width >= top.width or plane.height >= top.height:
        return False
    across, down = top.width / plane.width, top.height / plane.height
    return abs(plane.width - top.width / down) <= 2 or abs(plane.height - top.height / across) <= 2


def _vouched(page: Page, plane: Plane, finer: Sequence[Plane], vendor: str) -> bool:
    """Tell whether more than its size speaks for a level: a SubIFD, a vendor's rule, or a flag and a halved size."""
    if page.parent is not None or vendor == "perkinelmer" or (vendor == "aperio" and not page.reduced):
        return True
    halved = any(
        abs(plane.width * 2 - other.width) <= 2 and abs(plane.height * 2 - other.height) <= 2 for other in finer
    )
    return halved and page.reduced


def page_roles(pyramid: Pyramid, planes: Sequence[Plane]) -> dict[str, str]:
    """Return what every image of the file was taken for, when ``planes`` were found to be the slide and its levels,
    and the number by which it can be chosen."""
    taken = [number for number, plane in zip(pyramid.numbers, pyramid.planes, strict=True) if plane in planes]
    scenes = {scene.page.number: scene for scene in pyramid.scenes}
    roles = {f"tiff.image[{page.number}]": _role(page, taken, scenes.get(page.number)) for page in pyramid.pages}
    named = [pyramid.top, *(scene for scene in pyramid.scenes if scene is not pyramid.top)]
    names = [scene.ome.name or f"image {scene.page.number}" for scene in named if scene.ome is not None]
    more = {"tiff.scenes": ", ".join(names[:100])} if len(names) > 1 else {}
    return roles | more | {"tiff.scene": str(pyramid.top.number)}


def _role(page: Page, taken: Sequence[str], scene: SceneImage | None) -> str:
    width, height = page.size
    if page.number == taken[0]:
        role = "slide"
    elif page.number in taken:
        role = "level"
    elif page.mask:
        role = "mask"
    elif page.reduced:
        role = "label, macro or thumbnail"
    else:
        role = "other page"
    chosen_by = "" if scene is None or role == "level" else f", scene {scene.number}"
    called = f" ({scene.ome.name})" if scene is not None and scene.ome is not None and scene.ome.name else ""
    return f"{role}, {width} x {height} px{chosen_by}{called}"
