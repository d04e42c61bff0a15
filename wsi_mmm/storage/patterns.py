"""Patterns of object names: ``*`` and ``?`` stay inside a folder, ``**`` crosses folders, ``[abc]``, ``[!abc]``."""

from __future__ import annotations

import re
from collections.abc import Sequence


def match_uris(pattern: str, uris: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return those of ``uris`` that a pattern matches, and those below prefixes that it matches.

    A part of the path that exists under just that name, such as ``run[1]``, means itself.
    """
    scheme, _, path = pattern.partition("://")
    wanted = re.escape(f"{scheme}://")
    for part in path.rstrip("/").split("/"):
        itself = re.compile(f"{wanted}{re.escape(part)}(?:/|$)", re.DOTALL)
        wanted += re.escape(part) if any(map(itself.match, uris)) else _part_regex(part)
        wanted += "" if part == "**" else "/"
    whole, below = (re.compile(text, re.DOTALL) for text in (wanted.removesuffix("/"), f"{wanted}.*"))
    return [uri for uri in uris if whole.fullmatch(uri)], [uri for uri in uris if below.fullmatch(uri)]


def _part_regex(part: str) -> str:
    """Return the regular expression of a part between slashes."""
    if part == "**":
        return "(?:.*/)?"
    signs = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*|\*|\?|\[!?\]?[^\]]*\])", part)
    return "".join(signs.get(text) or (_class_regex(text) if text[:1] == "[" else re.escape(text)) for text in pieces)


def _class_regex(text: str) -> str:
    """Return the regular expression of ``[abc]``, ``[a-c]`` or ``[!abc]``; of itself when it is no such class."""
    inner = re.sub(r"[\\\[\]^]", r"\\\g<0>", text[1:-1].removeprefix("!"))
    found = f"[^/{inner}]" if text.startswith("[!") else f"[{inner}]"
    try:
        re.compile(found)
    except re.error:  # such as [9-1]
        return re.escape(text)
    return found
