"""The commands that look at one slide: info, thumbnail, tissue."""

from __future__ import annotations

import io
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated

import typer

from wsi_mmm.cli.console import error_line, facts, say, say_json, table
from wsi_mmm.errors import ManifestError, OutputError, WsiError

if TYPE_CHECKING:
    from wsi_mmm.types import U8, Mask, SlideInfo

SlideArgument = Annotated[str, typer.Argument(metavar="SLIDE", help="Path or URI.", show_default=False)]
SlidesArgument = Annotated[
    list[str], typer.Argument(metavar="SLIDE", help="Slides, folders, patterns or manifests.", show_default=False)
]
ReaderOption = Annotated[str | None, typer.Option(help="Force a reader: tiff, openslide, tiffslide or a plug-in's.")]
SceneOption = Annotated[
    int | None,
    typer.Option(
        "--scene", "--series", min=0, metavar="N",
        help="Image to read of a file that holds several, by the number that info shows.",
    ),
]  # fmt: skip
MppOverride = Annotated[float | None, typer.Option(help="Take the slide's own pixel to be this many micrometres wide.")]


def info(
    slides: SlidesArgument, mpp_override: MppOverride = None, reader: ReaderOption = None, scene: SceneOption = None
) -> int:
    """Show size, resolution, levels, vendor and images of slides.

    \b
    Examples:
      wsi-mmm info slide.svs
      wsi-mmm info slides/ --json
      wsi-mmm info two-scans.ome.tif --scene 1
      wsi-mmm info s3://bucket/slide.svs
    """
    from wsi_mmm.engine.monitoring.run_report import exit_code
    from wsi_mmm.inputs import expand_inputs
    from wsi_mmm.slides import open_slide

    statuses = []
    for spec in expand_inputs(slides, mpp_override, scene):
        try:
            if spec.error:
                raise ManifestError(spec.error)
            with open_slide(spec.uri, spec.mpp, reader, spec.scene) as slide:
                _show_info(slide.info)
            statuses.append("done")
        except WsiError as error:  # the other slides can still be shown
            error_line(str(error))
            statuses.append("failed")
    return exit_code(statuses)


def _show_info(slide: SlideInfo) -> None:
    from wsi_mmm.slides.base import NO_MPP  # with it comes numpy: not needed for --help

    say_json(slide)
    why = f": {slide.properties[NO_MPP]}" if NO_MPP in slide.properties else ""
    unknown = f"unknown{why} (--mpp-override 0.25 sets it)"
    pairs = {
        "size": f"{slide.width} x {slide.height} px",
        "mpp": unknown if slide.mpp_x is None else f"{slide.mpp_x:g} x {slide.mpp_y:g}",
        "objective": "unknown" if slide.objective is None else f"{slide.objective:g}x",
        "vendor": slide.vendor,
        "reader": slide.reader,
        "bounds offset": f"{slide.bounds_x}, {slide.bounds_y}",
        "fingerprint": slide.fingerprint,
    }
    pairs |= {key[5:]: role for key, role in slide.properties.items() if key.startswith("tiff.image[")}
    if any(", scene " in str(role) and not str(role).startswith("slide") for role in pairs.values()):
        pairs["scene"] = f"{slide.properties['tiff.scene']} is read; --scene N chooses another"
    facts(pairs, slide.uri)
    rows = [
        (n, f"{one.width} x {one.height}", f"{one.downsample_x:g}", f"{one.tile_width} x {one.tile_height}")
        for n, one in enumerate(slide.levels)
    ]
    table(rows, ("level", "size", "downsample", "tile"))


def thumbnail(
    slide: SlideArgument,
    output: Annotated[
        str, typer.Option("--output", "-o", help="A .png or .jpg file or s3:// object.")
    ] = "thumbnail.png",
    max_size: Annotated[int, typer.Option(help="Px of the longer side.", min=1)] = 1024,
    reader: ReaderOption = None,
    scene: SceneOption = None,
) -> None:
    """Write a small picture of a slide.

    \b
    Examples:
      wsi-mmm thumbnail slide.svs -o slide.png
      wsi-mmm thumbnail slide.svs -o slide.jpg --max-size 2048
    """
    from wsi_mmm.slides import open_slide

    with open_slide(slide, reader=reader, scene=scene) as opened:
        pixels = opened.thumbnail(max_size)
    write_picture(output, pixels)
    _report_written(output, {"width": pixels.shape[1], "height": pixels.shape[0]})


def tissue(
    slide: SlideArgument,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Mask (.png); the overlay goes beside it.")
    ] = "tissue.png",
    where: Annotated[str, typer.Option("--tissue", help="auto, cells, none, annotations or a mask image.")] = "auto",
    max_size: Annotated[int, typer.Option(help="Px of the longer side of the overlay.", min=1)] = 1536,
    reader: ReaderOption = None,
    scene: SceneOption = None,
) -> None:
    """Find the tissue and write it as a mask and a picture.

    \b
    Examples:
      wsi-mmm tissue slide.svs -o tissue.png          (and tissue-overlay.png)
      wsi-mmm tissue slide.svs --tissue regions.geojson
    """
    import numpy as np

    from wsi_mmm.slides import open_slide
    from wsi_mmm.tiles.tissue import tissue_mask

    with open_slide(slide, reader=reader, scene=scene) as opened:
        found = tissue_mask(opened, tissue=where)
        picture = opened.thumbnail(max_size)
    write_picture(output, np.where(found.mask, 255, 0).astype(np.uint8))
    beside = overlay_name(output)
    write_picture(beside, shade(picture, found.mask))
    _report_written(output, {"overlay": beside, "coverage": round(float(found.mask.mean()), 4)})


def _report_written(output: str, more: dict[str, object]) -> None:
    say_json({"output": output, **more})
    say(", ".join([f"wrote {output}", *(f"{name} {value}" for name, value in more.items())]))


def overlay_name(mask: str) -> str:
    """``mask.png`` -> ``mask-overlay.png``, in the same folder."""
    folder, slash, name = mask.rpartition("/")
    path = PurePosixPath(name)
    return f"{folder}{slash}{path.stem}-overlay{path.suffix}"


def shade(picture: U8, mask: Mask) -> U8:
    """``picture`` uint8[h, w, 3] with what is not tissue greyed, and a green line round what is."""
    import numpy as np

    height, width = picture.shape[:2]
    rows = np.minimum(np.arange(height) * mask.shape[0] // height, mask.shape[0] - 1)
    columns = np.minimum(np.arange(width) * mask.shape[1] // width, mask.shape[1] - 1)
    inside = np.pad(mask[np.ix_(rows, columns)], 2, mode="edge")
    core = inside[2:-2, 2:-2]
    around = np.stack(
        [inside[2 + dy : 2 + dy + height, 2 + dx : 2 + dx + width] for dy in (-2, 0, 2) for dx in (-2, 0, 2)]
    )
    shaded = np.where(core[..., None], picture, picture // 3 + 150).astype(np.uint8)
    shaded[core & ~around.all(axis=0)] = (0, 150, 60)
    return shaded


def write_picture(uri: str, pixels: U8) -> None:
    """Write uint8[h, w] or uint8[h, w, 3] in the format that the suffix of ``uri`` names. Raises OutputError."""
    from PIL import Image

    from wsi_mmm.storage import store

    kind = Image.registered_extensions().get(PurePosixPath(uri).suffix.lower())
    if kind not in ("PNG", "JPEG", "TIFF", "WEBP"):
        raise OutputError(f"cannot tell the picture format of {store.redact(uri)}; end it in .png or .jpg")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    store.write_bytes(uri, buffer.getvalue())
