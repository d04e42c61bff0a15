"""The commands about the EMPAIA platform: empaia init."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from wsi_mmm.cli_console import EXIT_CODES, Debug, Json, flags, guarded, say, say_json

empaia_app = typer.Typer(
    help="Make a model an app of the EMPAIA platform.\n\n\b\nExamples:\n  wsi-mmm empaia init default -o app/",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    epilog=EXIT_CODES,
)


class RegionShape(StrEnum):
    """Shapes of regions of interest."""

    rectangle = "rectangle"
    polygon = "polygon"
    circle = "circle"


@empaia_app.callback()
def empaia() -> None:
    """Make a model an app of the EMPAIA platform."""


def init(
    model: Annotated[str, typer.Argument(help="Packaged model, or the folder of one.")] = "default",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of ead.json.", metavar="FOLDER")] = Path(),
    vendor: Annotated[str, typer.Option(help="Who offers the app: part of its namespace.")] = "wsi_mmm",
    regions: Annotated[RegionShape, typer.Option(help="The shape of regions of interest.")] = RegionShape.rectangle,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the description (EAD) that registers a model with the platform.

    \b
    Examples:
      wsi-mmm empaia init default -o app/
      wsi-mmm empaia init my-model/ -o app/ --vendor my_hospital --regions polygon
    """
    from wsi_mmm.empaia.ead import ead, ead_json, write_ead
    from wsi_mmm.model.card import read_card

    made = ead(read_card(model), vendor=vendor, regions=regions.value)
    path = write_ead(ead_json(made), output)
    if flags.json:
        say_json({"path": path, "namespace": made["namespace"], "outputs": len(made["io"]) - 2})
    say(f"wrote {path}: {made['namespace']}")


empaia_app.command("init", epilog=EXIT_CODES)(guarded(init))
