"""The table of options in docs/cli.md, from `wsi_mmm.options`. ``python -m helpers.option_table`` writes it."""

from __future__ import annotations

from pathlib import Path

from wsi_mmm.options import OPTIONS, Option, default_words

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
BEGIN = "<!-- begin of the option table: made by tests/helpers/option_table.py -->"
END = "<!-- end of the option table -->"


def option_table() -> str:
    """Every option of ``run`` and ``embed``: flag, Python name, default, effect and help."""
    rows = ["| flag | Python, settings file | default | changes | meaning |", "|---|---|---|---|---|"]
    return "\n".join([*rows, *map(_row, OPTIONS)])


def _row(option: Option) -> str:
    value = "" if option.value_type is bool else f" {option.metavar or option.value_type.__name__.upper()}"
    flags = ", ".join(f"`{flag}`" for flag in option.flags[:-1]) + ", " * (len(option.flags) > 1)
    flags += f"`{option.flags[-1]}{value}`" if option.flags else ""
    name = f"`{option.name}`" if option.settings or option.name == "output" else ""
    default = "" if option.default is None or not name else f"`{option.default}`"
    if option.default is None:
        words = {command: default_words(option, command) for command in option.commands}
        same = len(set(words.values())) == 1
        default = words[option.commands[0]] if same else ", ".join(f"`{name}`: {text}" for name, text in words.items())
    only = f"`{option.commands[0]}`: " if len(option.commands) == 1 else ""
    see = f" See {option.see}." if option.see else ""
    changes = ", ".join(option.affects) or "nothing"
    return f"| {flags} | {name} | {default} | {changes} | {only}{option.help}{see} |"


def page_with_table(text: str) -> str:
    """The page with the table as it should be."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{option_table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text()))
