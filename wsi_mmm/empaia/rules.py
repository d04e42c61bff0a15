"""Rules that names, texts and ids of every object keep."""

from __future__ import annotations

from wsi_mmm.errors import OutputError


def checked_name(name: str) -> str:
    """``name`` if it has 1 to 200 characters without blanks round them; OutputError otherwise."""
    return _check_length(name, 200, "a name")


def checked_text(text: str | None, longest: int = 1000) -> str | None:
    """``text`` if it has 1 to ``longest`` characters without blanks round them, or None; OutputError otherwise."""
    return None if text is None else _check_length(text, longest, "a text")


def checked_id(text: str) -> str:
    """``text`` if it can be an id of the platform (1 to 50 characters); OutputError otherwise."""
    return _check_length(text, 50, "an id")


def _check_length(text: str, longest: int, what: str) -> str:
    if not 1 <= len(text) <= longest or text != text.strip():
        raise OutputError(f"{what} needs 1 to {longest} characters and no blanks round them: {text[:60]!r}")
    return text
