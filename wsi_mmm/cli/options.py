"""The flags of the commands run and embed, made from `wsi_mmm.options`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wsi_mmm import config
from wsi_mmm.cli.console import Debug, Json
from wsi_mmm.options import (
    OBSERVE_OPTIONS,
    WHERE,
    CommandName,
    Option,
    check_value,
    command_options,
    resolution,
    settings_names,
)

if TYPE_CHECKING:
    from wsi_mmm.engine.monitoring.observe import Observe

Command = Callable[..., int]

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


def add_flags(command: CommandName, *, output: str) -> Callable[[Command], Command]:
    """Give a command function ``(inputs, output, flags)`` the flags of its options; ``output``: its default folder.

    ``flags`` holds the values of all other flags by the names of their options; those not given are None.
    """

    def decorate(function: Command) -> Command:
        @functools.wraps(function)
        def command_function(inputs: list[str], output: str, **values: Any) -> int:
            flags = {o.name: _read_flag(o, values[o.name]) for o in command_options(command) if o.name != "output"}
            return function(inputs, output, flags)

        parameters = [
            Parameter("inputs", Parameter.KEYWORD_ONLY, annotation=Inputs),
            *(_flag_parameter(option, output) for option in command_options(command)),
            Parameter("json", Parameter.KEYWORD_ONLY, annotation=Json, default=False),
            Parameter("debug", Parameter.KEYWORD_ONLY, annotation=Debug, default=False),
        ]
        command_function.__signature__ = Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
        command_function.__annotations__ = {one.name: one.annotation for one in parameters}
        return command_function

    return decorate


def _flag_parameter(option: Option, output: str) -> Parameter:
    kind: Any = str if option.parse else option.value_type
    if kind is not bool:
        kind = (list[kind] if option.several else kind) | None
    default = output if option.name == "output" else False if option.value_type is bool else None
    flag = typer.Option(*option.flags, help=option.help, rich_help_panel=option.panel, metavar=option.metavar)
    return Parameter(option.name, Parameter.KEYWORD_ONLY, annotation=Annotated[kind, flag], default=default)


def _read_flag(option: Option, value: Any) -> Any:
    """Return the option's value that a flag says; None when the flag was not given."""
    if option.value_type is bool:
        return option.flag_value if value else None
    return value or None if option.several else value


def read_options(command: CommandName, flags: Mapping[str, Any]) -> tuple[dict[str, Any], Observe]:
    """Return the options for the api and how the run is observed: flags, over the settings file, over the environment.

    Raises OptionError, ConfigError.
    """
    from wsi_mmm.engine.monitoring.observe import Observe  # imports numpy: not needed for --help

    given = {**flags, "mpp": resolution(flags["mpp"], flags["mag"])}
    names = settings_names(command)
    settings = config.read_settings(flags["config"], names) if flags["config"] else {}
    options = {**settings, **{name: value for name, value in given.items() if name in names and value is not None}}
    if cache := config.default_cache():
        options.setdefault("cache", cache)
    if (tls := config.default_tls()) and str(options.get("scheduler", "")).startswith("tls://"):
        options.setdefault("tls", tls)
    watched = {o.name: check_value(o, options.pop(o.name)) for o in OBSERVE_OPTIONS if o.name in options}
    if isinstance(watched.get("traces"), bool):
        watched["traces"] = config.trace_exporter() if watched["traces"] else None
    return options, Observe(**watched)
