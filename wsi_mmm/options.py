"""Every option of a run, once: name, type, default, help, flag, the check of its value, and what it affects.

Derived from `RunOptions`: the flags of ``wsi-mmm run`` and ``embed``, the names that a settings file may use, the
checks of every caller, the options that the hashes of a recipe cover and that reports show, and the table in
docs/cli.md. To add an option, add a field to `RunOptions` and, for Python callers, the same name to `RunKeywords`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, cast

from wsi_mmm.errors import OptionError

T = TypeVar("T")
Affects = Literal["values", "result"]
CommandName = Literal["run", "embed"]
Placement = Literal["beside", "pool"]
ValueCheck = Callable[[str, Any], str]
"""Returns what is wrong with the value of a named option, as a message; empty when it is right."""

LEAST_TISSUE = 0.02
"""Share of a tile that must be tissue, unless a user says otherwise."""

EMBED_DEFAULTS = {"mpp": 0.5, "tile_size": 256, "overlap": 0, "block_tiles": 8}
"""Options of a run that computes features alone, unless a user says otherwise; ``mpp``: of encoders that are of no
model."""

BLOCK_TILES = 4  # of a run with a model

WHAT, HOW, WHERE, SLIDES, WATCH = "What to compute", "How to compute it", "Where results go", "Slides", "Watch it"
BOTH: tuple[CommandName, ...] = ("run", "embed")
TISSUE_WORDS = ("auto", "cells", "none")
"""What `tissue` may say instead of naming a file."""

CHANGES_VALUES: tuple[Affects, ...] = ("values", "result")
CHANGES_RESULT: tuple[Affects, ...] = ("result",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option. ``flags``: on the command line, none for options that only Python and settings files set.

    ``affects``: "values", the numbers that the network computes and the cache keeps; "result", the published files;
    empty: nothing. ``per``: what it belongs to; those of a "slide" are resolved slide by slide, those of the "run" say
    where the work is done. ``parse`` is applied before the type is checked, ``check`` after it; values of the types
    ``accepts`` pass as they are. ``takes``: what the value must be, in words. ``flag_value``: the value that a flag
    without a value stands for. ``settings``: whether a settings file may set it. ``after``: the option that it follows
    in the help. ``unset``: the value, in words, that no value stands for, where the commands differ for each. ``see``:
    a link for the table in the documentation.
    """

    name: str
    value_type: type
    default: Any
    help: str
    flags: tuple[str, ...] = ()
    panel: str = HOW
    metavar: str | None = None
    affects: tuple[Affects, ...] = ()
    per: Literal["recipe", "slide", "run", "command"] = "recipe"
    commands: tuple[CommandName, ...] = BOTH
    check: ValueCheck | None = None
    parse: Callable[[Any], object] | None = None
    accepts: tuple[type, ...] = ()
    takes: str = ""
    flag_value: object = True
    several: bool = False
    settings: bool = True
    after: str = ""
    unset: str | Mapping[CommandName, str] = ""
    see: str = ""


# ---------------------------------------------------------------- checks


def positive_mpp(value: str | float) -> float:
    """Return ``value`` as micrometres per pixel; OptionError unless it is a finite number above zero."""
    try:
        mpp = float(value)
    except ValueError as error:
        raise OptionError(f"mpp {value!r} is not a number; give micrometres per pixel, such as 0.25") from error
    if wrong := _check_mpp("mpp", mpp):
        raise OptionError(wrong)
    return mpp


def resolution(mpp: float | None, mag: float | None) -> float | None:
    """Return the mpp asked for, as such or as a nominal magnification (10 / magnification: 20x is 0.5 mpp)."""
    if mag is None:
        return mpp
    if mpp is not None:
        raise OptionError("give --mpp or --mag, not both")
    if not math.isfinite(mag) or mag <= 0:
        raise OptionError(f"magnification {mag} is not possible; give a number above zero, such as 20")
    return 10.0 / mag


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_size(text: str | int) -> int:
    """Return a number of bytes from a text such as "50GB" or "1.5 TiB". Raises OptionError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = _UNITS.get(found.group(2).upper()) if found else None
    if found is None or unit is None or float(found.group(1)) <= 0:
        raise OptionError(f"{text!r} is no size: give a number of bytes with a unit, such as 50GB")
    return int(float(found.group(1)) * unit)


def _at_least(least: int) -> ValueCheck:
    return lambda name, value: "" if value >= least else f"{name} must be at least {least}, not {value}"


def _one_of(*words: str) -> ValueCheck:
    shown = " or ".join((", ".join(words[:-1]), words[-1]))
    return lambda name, value: "" if value in words else f"{name} is {shown}, not {value!r}"


def _check_mpp(name: str, value: float) -> str:
    possible = math.isfinite(value) and value > 0
    return "" if possible else f"{name} {value} is not possible; give micrometres per pixel above zero, such as 0.25"


def _check_blocks(name: str, value: int) -> str:
    return "" if 1 <= value <= 64 else f"{name} must be between 1 and 64, not {value}"


def _check_share(name: str, value: float) -> str:
    return "" if 0 <= value <= 1 else f"{name} is a share between 0 and 1, not {value}"


def _check_device(name: str, value: str) -> str:
    known = re.fullmatch(r"auto|cpu|(cuda|mps|xpu)(:\d+)?", value)
    return "" if known else f"there is no {name} {value!r}; choose auto, cpu, cuda or cuda:N"


def _switch_word(value: object) -> object:
    """Return the word for true and false, as Python callers may say it."""
    return ("on" if value else "off") if isinstance(value, bool) else value


# ---------------------------------------------------------------- the options


def _models_own(name: str) -> Mapping[CommandName, str]:
    """The words for an option that a model decides, and that `embed` has a number for."""
    return {"run": "the model's", "embed": f"{EMBED_DEFAULTS[name]:g}"}


def _run_option(default: T, words: str, *flags: str, **rest: Any) -> T:
    """A field of `RunOptions`, with the rest of its `Option`."""
    return field(default=default, metadata={"help": words, "flags": flags, **rest})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The options of a run. Values are checked and made plain (int, float, bool, str); OptionError names the fault.

    None stands for what the model, the command or the machine decides.
    """

    mpp: float | None = _run_option(
        None, "Resolution to work at, micrometres per pixel.", "--mpp",
        panel=WHAT, affects=CHANGES_VALUES, check=_check_mpp,
        unset={"run": "the model's", "embed": f"the model's, else {EMBED_DEFAULTS['mpp']:g}"},
    )  # fmt: skip
    tile_size: int | None = _run_option(
        None, "Tile width in px at that resolution.", "--tile-size",
        panel=WHAT, unset=_models_own("tile_size"), affects=CHANGES_VALUES,
    )  # fmt: skip
    overlap: int | None = _run_option(
        None, "Px that neighbouring tiles share.", "--overlap",
        panel=WHAT, unset=_models_own("overlap"), affects=CHANGES_VALUES,
    )  # fmt: skip
    tissue: str = _run_option(
        "auto", "auto, cells (scattered ones, too), none (the whole slide), annotations or a mask image.", "--tissue",
        panel=WHAT, metavar="WHERE", affects=CHANGES_RESULT, takes="a path or a word",
    )  # fmt: skip
    regions: str | None = _run_option(
        None, "Annotations (GeoJSON, XML): work only in their polygons.", "--regions",
        panel=WHAT, metavar="FILE", affects=CHANGES_RESULT, takes="a path or a word", commands=("run",),
        see="[outputs](outputs.md)",
    )  # fmt: skip
    tiles: str | None = _run_option(
        None, "The tiles to embed: a TRIDENT or CLAM .h5 file, or a folder with one per slide.", "--tiles",
        panel=WHAT, metavar="FILE", affects=CHANGES_VALUES, per="slide", takes="a path or a word", commands=("embed",),
        see="[moving in](migrating.md#their-tiles)",
    )  # fmt: skip
    min_tissue: float = _run_option(
        LEAST_TISSUE, "Share of a tile that must be tissue.", panel=WHAT, affects=CHANGES_RESULT, check=_check_share
    )
    mpp_override: float | None = _run_option(
        None, "Take the slides' own pixel to be this many micrometres wide.", "--mpp-override",
        panel=SLIDES, affects=CHANGES_VALUES, per="slide", check=_check_mpp,
    )  # fmt: skip
    reader: str | None = _run_option(
        None, "Force a reader: tiff, openslide, tiffslide or a plug-in's.", "--reader",
        panel=SLIDES, affects=CHANGES_VALUES, per="slide",
    )  # fmt: skip
    scene: int | None = _run_option(
        None, "Image to read of a file that holds several, by the number that info shows.", "--scene", "--series",
        panel=SLIDES, affects=CHANGES_VALUES, per="slide", metavar="N", check=_at_least(0),
    )  # fmt: skip
    cache: str | None = _run_option(
        None, "Folder or s3:// prefix that keeps features and maps between runs. (environment: WSI_MMM_CACHE)",
        "--cache", panel=WHERE, takes="a path or a word",
    )  # fmt: skip
    cache_tiles: str = _run_option(
        "auto", "Keep read tiles in --cache too: on, off, or auto (where a measurement says that it pays).",
        "--cache-tiles", panel=WHERE, metavar="WHEN", parse=_switch_word, check=_one_of("auto", "on", "off"),
        see="[storage](storage.md)",
    )  # fmt: skip
    cache_quota: int | None = _run_option(
        None, "Most that cached tiles take, such as 50GB; the least recently used go first.", "--cache-quota",
        panel=WHERE, metavar="SIZE", parse=parse_size,
    )  # fmt: skip
    features: bool = _run_option(True, "Publish a feature vector per tile.", panel=WHERE, affects=CHANGES_VALUES)
    save_maps: bool = _run_option(
        False, "Keep the probability maps of segment tasks (Zarr).", "--maps",
        panel=WHERE, affects=CHANGES_RESULT, commands=("run",), see="[outputs](outputs.md)",
    )  # fmt: skip
    gzip: bool = _run_option(
        True, "Write result.geojson instead of result.geojson.gz.", "--no-gzip",
        panel=WHERE, affects=CHANGES_RESULT, commands=("run",), flag_value=False,
    )  # fmt: skip
    overlay: bool = _run_option(
        True, "Draw overlay.png, which reads the slide once more.",
        panel=WHERE, affects=CHANGES_RESULT, commands=("run",),
    )  # fmt: skip
    bounds_offset: bool = _run_option(
        False, "Coordinates relative to the scanned area, for viewers that crop to it (see docs/outputs.md).",
        "--bounds-offset", panel=WHERE, affects=CHANGES_RESULT, commands=("run",),
    )  # fmt: skip
    measure: str = _run_option(
        "shape", "Measurements of single objects: none, or shape (area, perimeter, axes ... in µm).",
        "--measure", panel=WHAT, metavar="WHAT", affects=CHANGES_RESULT, commands=("run",),
        check=_one_of("none", "shape"), see="[outputs](outputs.md#measurements)",
    )  # fmt: skip
    batch_size: int = _run_option(64, "Tiles per batch; changes speed only.", "--batch-size", check=_at_least(1))
    block_tiles: int | None = _run_option(
        None, "Rows and columns of tiles that are read and kept together.",
        unset={"run": str(BLOCK_TILES), "embed": str(EMBED_DEFAULTS["block_tiles"])},
        affects=("values",), check=_check_blocks,
    )  # fmt: skip
    workers: int = _run_option(
        0, "Local worker processes, each on a GPU of its own; 0: this process.", "--workers",
        per="run", check=_at_least(0),
    )  # fmt: skip
    threads: int | None = _run_option(None, "Model threads per process.", "--threads", check=_at_least(1))
    device: str = _run_option(
        "auto", "auto, cpu, cuda or cuda:N.", "--device", affects=("values",), check=_check_device
    )
    runtime: str = _run_option(
        "auto",
        "How the model runs: auto, eager (float32), compile, bf16, fp16 or onnx; the numbers differ a little.",
        "--runtime", affects=CHANGES_VALUES, check=_one_of("auto", "eager", "compile", "bf16", "fp16", "onnx"),
        see="[encoders](encoders.md#precision)",
    )  # fmt: skip
    allow_torchscript: bool = _run_option(
        False, "Run a TorchScript model (WSInfer zoo), which is code, in a process of its own.", "--allow-torchscript",
        commands=("run",), see="[security](security.md#torchscript)",
    )  # fmt: skip
    scheduler: str | None = _run_option(
        None, "Dask scheduler to send the work to, such as tcp://host:8786.", "--scheduler",
        metavar="ADDRESS", per="run", see="[cluster](cluster.md)",
    )  # fmt: skip
    tls: str | None = _run_option(
        None, "Folder of ca.crt, tls.crt, tls.key for a tls:// scheduler.", "--tls",
        metavar="FOLDER", per="run", takes="a path or a word", see="[security](security.md)",
    )  # fmt: skip
    placement: Placement = _run_option(  # noqa: RUF009  (a field)
        "beside", "Who reads tiles: workers that run the model (beside), or others, into --cache (pool).",
        "--placement", metavar="WHERE", per="run", check=_one_of("beside", "pool"), see="[cluster](cluster.md)",
    )  # fmt: skip
    force: bool = _run_option(False, "Redo what is already done.", "--force")

    def __post_init__(self) -> None:
        for option in RUN_OPTIONS:
            value = getattr(self, option.name)
            if value is not None:
                object.__setattr__(self, option.name, check_value(option, value))
        if self.cache_tiles == "on" and self.cache is None:
            raise OptionError("tiles can only be cached where there is a cache: name a folder with --cache")
        if self.placement == "pool" and self.cache is None:
            raise OptionError("with placement pool tiles go through a cache that all workers see: name it with --cache")
        if self.tiles is not None:
            _check_listed(self)


def _check_listed(options: RunOptions) -> None:
    """OptionError for options that choose tiles, or keep those of a grid, beside a list of tiles."""
    wrong = {
        "tissue": options.tissue != "auto", "regions": options.regions is not None,
        "min_tissue": options.min_tissue != LEAST_TISSUE, "cache_tiles on": options.cache_tiles == "on",
        "placement pool": options.placement == "pool",
    }  # fmt: skip
    for name in (name for name, given in wrong.items() if given):
        raise OptionError(f"a file lists the tiles, which {name} cannot go with: leave one of them out")


class RunKeywords(TypedDict, total=False):
    """The options of `wsi_mmm.run`, ``embed`` and ``submit`` as Python callers give them; None: the default."""

    mpp: float | None
    tile_size: int | None
    overlap: int | None
    tissue: str | Path | None
    regions: str | Path | None
    tiles: str | Path | None
    min_tissue: float | None
    mpp_override: float | None
    reader: str | None
    scene: int | None
    cache: str | Path | None
    cache_tiles: Literal["auto", "on", "off"] | bool | None
    cache_quota: int | str | None
    features: bool | None
    save_maps: bool | None
    gzip: bool | None
    overlay: bool | None
    bounds_offset: bool | None
    measure: Literal["none", "shape"] | None
    batch_size: int | None
    block_tiles: int | None
    threads: int | None
    device: str | None
    runtime: Literal["auto", "eager", "compile", "bf16", "fp16", "onnx"] | None
    allow_torchscript: bool | None
    tls: str | Path | None
    placement: Placement | None
    force: bool | None


class EncoderKeywords(TypedDict, total=False):
    """The options of an encoder as Python callers give them; None: as its registry entry or its weights say."""

    weights: str | None
    pool: str | None
    input_size: int | None
    mean: Sequence[float] | str | None
    std: Sequence[float] | str | None
    encoder_args: Mapping[str, Any] | str | None
    slide: str | Path | None


class EmbedKeywords(RunKeywords, EncoderKeywords, total=False):
    """The options of `wsi_mmm.embed` and ``embed_encoders``: those of a run and those of an encoder."""


def split_keywords(given: EmbedKeywords) -> tuple[EncoderKeywords, RunKeywords]:
    """Return the options of the encoder and those of the run."""
    own = {name: value for name, value in given.items() if name in EncoderKeywords.__annotations__}
    rest = {name: value for name, value in given.items() if name not in own}
    return cast("EncoderKeywords", own), cast("RunKeywords", rest)


_TYPES: dict[str, type] = {"float": float, "int": int, "bool": bool, "str": str, "Placement": str}

RUN_OPTIONS: tuple[Option, ...] = tuple(
    Option(name=one.name, value_type=_TYPES[str(one.type).removesuffix(" | None")], default=one.default, **one.metadata)
    for one in fields(RunOptions)
)
"""The fields of `RunOptions` with all that is said of them."""


def _command_option(name: str, value_type: type, words: str, *flags: str, **rest: Any) -> Option:
    """An option that the command line has and `RunOptions` has not."""
    default = False if value_type is bool else None
    return Option(name=name, value_type=value_type, default=default, help=words, flags=flags, per="command", **rest)


_FIRST: tuple[Option, ...] = (
    _command_option(
        "output", str, "Folder or s3:// prefix of the results.", "--output", "-o", panel=WHERE, settings=False
    ),
    _command_option(
        "model", str, "Packaged model or model folder, s3:// too.", "--model", "-m",
        panel=WHAT, unset="default", affects=CHANGES_VALUES, commands=("run",),
    ),
    _command_option(
        "encoder", str, "Published encoder, timm name, hf-hub: id, or model folder, s3:// too; repeatable.",
        "--encoder", "--model", "-m", panel=WHAT, unset="the default model's encoder",
        affects=CHANGES_VALUES, commands=("embed",), several=True, see="[encoders](encoders.md#several-at-once)",
    ),
    _command_option(
        "tasks", str, "Task of the model, repeatable.", "--task",
        panel=WHAT, unset="all; of a few-shot model that of its head",
        metavar="NAME", affects=CHANGES_VALUES, commands=("run",), several=True,
    ),
    _command_option(
        "weights", str, "Weights of the encoder: a .safetensors file, its folder, or 'random'.", "--weights",
        panel=WHAT, affects=CHANGES_VALUES, commands=("embed",), see="[encoders](encoders.md)",
    ),
    _command_option(
        "pool", str,
        "Vector of an encoder: cls, patch_mean, cls+patch_mean, gap or native.",
        "--pool", panel=WHAT, unset="as published, else native", affects=CHANGES_VALUES, commands=("embed",),
    ),
    _command_option(
        "input_size", int, "Resize tiles to so many px for the encoder.",
        "--input-size", panel=WHAT, unset="as published, else not", affects=CHANGES_VALUES, commands=("embed",),
    ),
    _command_option(
        "mean", str, "Mean of R,G,B in 0 to 1, as the weights were trained.", "--mean",
        panel=WHAT, unset="theirs", metavar="R,G,B", affects=CHANGES_VALUES, commands=("embed",),
    ),
    _command_option(
        "std", str, "Standard deviation of R,G,B, likewise.", "--std",
        panel=WHAT, unset="theirs", metavar="R,G,B", affects=CHANGES_VALUES, commands=("embed",),
    ),
    _command_option(
        "encoder_args", str, "Arguments of the timm network, such as '{\"init_values\": 1e-5}'.", "--encoder-args",
        panel=WHAT, metavar="JSON", affects=CHANGES_VALUES, commands=("embed",),
    ),
    _command_option(
        "slide", str, "A vector per slide, too: mean, or the folder of a bag model or ABMIL.", "--slide",
        panel=WHAT, metavar="MODEL", unset="none", affects=CHANGES_RESULT, commands=("embed",),
        see="[encoders](encoders.md#slide-vectors)",
    ),
)  # fmt: skip
_LAST: tuple[Option, ...] = (
    _command_option(
        "mag", float, "The same as a nominal magnification: 20 means --mpp 0.5.", "--mag",
        panel=WHAT, affects=CHANGES_VALUES, after="mpp", settings=False,
    ),
    _command_option(
        "detach", bool, "Leave the job to the --scheduler and say its id; see 'wsi-mmm jobs'.", "--detach",
        commands=("run",), after="placement", see="[cluster](cluster.md)", settings=False,
    ),
    _command_option(
        "dry_run", bool, "Check options, model and every slide; compute nothing.", "--dry-run", settings=False
    ),
    _command_option(
        "config", Path, "TOML file of these options; flags win over it.", "--config", metavar="FILE", settings=False
    ),
)  # fmt: skip
OBSERVE_OPTIONS: tuple[Option, ...] = (
    _command_option(
        "log_file", str, "Add what happens to this file, a JSON object per line.", "--log-file",
        panel=WATCH, takes="a path", see="[watching a run](observing.md)",
    ),
    _command_option(
        "log_level", str,
        "debug (every unit of work), info, warning or error; without --log-file to stderr.",
        "--log-level", panel=WATCH, unset="info",
    ),
    _command_option(
        "metrics_port", int, "Serve Prometheus metrics on this port of this machine.", "--metrics-port", panel=WATCH
    ),
    _command_option(
        "traces", bool, "Send OpenTelemetry traces, as the OTEL_ variables say.", "--traces",
        panel=WATCH, takes="true, false or the name of an exporter", accepts=(str,),
    ),
)  # fmt: skip
"""The fields of `Observe`, as the command line and settings files give them."""


def _help_sequence() -> tuple[Option, ...]:
    ordered = [*_FIRST, *RUN_OPTIONS]
    for option in (*_LAST, *OBSERVE_OPTIONS):
        places = [number for number, one in enumerate(ordered, start=1) if one.name == option.after]
        ordered.insert(places[0] if places else len(ordered), option)
    return tuple(ordered)


OPTIONS: tuple[Option, ...] = _help_sequence()
"""Every option of the commands ``run`` and ``embed``, in the order of their help."""


GIVE_MPP = "give --mpp-override 0.25 (Python: mpp_override=0.25) or a manifest with a column 'mpp'"
"""The way out for a slide of a run that does not say its resolution."""


# ---------------------------------------------------------------- what is derived


def command_options(command: CommandName) -> tuple[Option, ...]:
    """Return the options that a command has a flag for."""
    return tuple(option for option in OPTIONS if option.flags and command in option.commands)


def default_words(option: Option, command: CommandName) -> str:
    """Return what an option is when a user does not give it, in words; empty for flags and where that is nothing."""
    if option.value_type is bool:
        return ""
    if option.default is not None:
        return str(option.default)
    return option.unset if isinstance(option.unset, str) else option.unset.get(command, "")


def settings_names(command: CommandName) -> list[str]:
    """Return the names that a settings file of a command may use."""
    return [option.name for option in OPTIONS if option.settings and command in option.commands]


def recipe_names(affects: Affects | None = None) -> list[str]:
    """Return the names of the options that belong to a recipe: all, or those that affect its values or its result."""
    return [o.name for o in RUN_OPTIONS if o.per == "recipe" and (affects is None or affects in o.affects)]


def make_options(given: RunKeywords, *, workers: int = 0, scheduler: str | None = None) -> RunOptions:
    """Return the options that a caller gave by name, None meaning the default. OptionError names the known ones."""
    for name in given:
        if name not in RunKeywords.__annotations__:
            raise OptionError(f"unknown option {name!r}; known: {', '.join(sorted(RunKeywords.__annotations__))}")
    named: dict[str, Any] = {"workers": workers, "scheduler": scheduler, **given}
    return RunOptions(**{name: value for name, value in named.items() if value is not None})


_PLAIN: dict[type, tuple[type, str]] = {
    float: (Real, "a number"), int: (Integral, "a whole number"), bool: (bool, "true or false"), str: (str, "a word"),
}  # fmt: skip


def check_value(option: Option, value: Any) -> Any:
    """Return the value of an option as a plain int, float, bool or str. OptionError says what it must be."""
    value = str(value) if isinstance(value, Path) and option.value_type is str else value
    if option.accepts and isinstance(value, option.accepts):
        return value
    kind, words = _PLAIN[option.value_type]
    value = option.parse(value) if option.parse else value
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise OptionError(f"option {option.name} must be {option.takes or words}, not {value!r}")
    value = option.value_type(value)
    if option.check is not None and (wrong := option.check(option.name, value)):
        raise OptionError(wrong)
    return value
