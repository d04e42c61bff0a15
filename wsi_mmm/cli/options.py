"""What the commands run and embed can be told: their options, once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

WHAT, HOW, WHERE, SLIDES = "What to compute", "How to compute it", "Where results go", "Slides"

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="SLIDE",
        help="Slides, folders, patterns ('slides/*.svs'), s3:// prefixes or patterns, or a manifest CSV.",
        show_default=False,
    ),
]
Output = Annotated[
    str, typer.Option("--output", "-o", help="Folder or s3:// prefix of the results.", rich_help_panel=WHERE)
]
Cache = Annotated[
    str | None,
    typer.Option(
        help="Folder or s3:// prefix that keeps features and maps between runs. (environment: WSI_MMM_CACHE)",
        rich_help_panel=WHERE,
    ),
]
CacheTiles = Annotated[
    str | None,
    typer.Option(
        help="Keep read tiles in --cache too: on, off, or auto (where a measurement says that it pays).",
        rich_help_panel=WHERE,
        metavar="WHEN",
    ),
]
CacheQuota = Annotated[
    str | None,
    typer.Option(
        help="Most that cached tiles take, such as 50GB; the least recently used go first.",
        rich_help_panel=WHERE,
        metavar="SIZE",
    ),
]
Mpp = Annotated[
    float | None,
    typer.Option(help="Resolution to work at, micrometres per pixel. (default: the model's)", rich_help_panel=WHAT),
]
Mag = Annotated[
    float | None, typer.Option(help="The same as a nominal magnification: 20 means --mpp 0.5.", rich_help_panel=WHAT)
]
TileSize = Annotated[
    int | None, typer.Option(help="Tile width in px at that resolution. (default: the model's)", rich_help_panel=WHAT)
]
Overlap = Annotated[
    int | None, typer.Option(help="Px that neighbouring tiles share. (default: the model's)", rich_help_panel=WHAT)
]
Tissue = Annotated[
    str | None,
    typer.Option(
        help="auto, none (the whole slide), or a GeoJSON or mask image.", rich_help_panel=WHAT, metavar="WHERE"
    ),
]
Regions = Annotated[
    str | None,
    typer.Option(help="GeoJSON of polygons (level-0 px): work only there.", rich_help_panel=WHAT, metavar="FILE"),
]
MppOverride = Annotated[
    float | None,
    typer.Option(help="Take the slides' own pixel to be this many micrometres wide.", rich_help_panel=SLIDES),
]
Reader = Annotated[
    str | None, typer.Option(help="Force a reader: tiff, openslide or tiffslide.", rich_help_panel=SLIDES)
]
Batch = Annotated[int | None, typer.Option(help="Tiles per batch; changes speed only.", rich_help_panel=HOW)]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Local worker processes, each on a GPU of its own; 0: this process. (default: 0)", rich_help_panel=HOW
    ),
]
Threads = Annotated[int | None, typer.Option(help="Model threads per process.", rich_help_panel=HOW)]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N. (default: auto)", rich_help_panel=HOW)]
Runtime = Annotated[
    str | None,
    typer.Option(
        help="How the model runs: eager, compile, bf16 or onnx; the numbers differ a little. (default: eager)",
        rich_help_panel=HOW,
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="Dask scheduler to send the work to, such as tcp://host:8786.", rich_help_panel=HOW, metavar="ADDRESS"
    ),
]
Tls = Annotated[
    str | None,
    typer.Option(
        help="Folder of ca.crt, tls.crt, tls.key for a tls:// scheduler.", rich_help_panel=HOW, metavar="FOLDER"
    ),
]
Placement = Annotated[
    str | None,
    typer.Option(
        help="Who reads tiles: workers that run the model (beside), others, into --cache (pool), or auto.",
        rich_help_panel=HOW,
        metavar="WHERE",
    ),
]
Detach = Annotated[
    bool,
    typer.Option(
        "--detach", help="Leave the job to the --scheduler and say its id; see 'wsi-mmm jobs'.", rich_help_panel=HOW
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Redo what is already done.", rich_help_panel=HOW)]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check options, model and every slide; compute nothing.", rich_help_panel=HOW),
]
Settings = Annotated[
    Path | None,
    typer.Option(
        "--config", help="TOML file of these options; flags win over it.", rich_help_panel=HOW, metavar="FILE"
    ),
]
