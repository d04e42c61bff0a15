"""One tree of errors, drawn once and complete."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

import wsi_mmm
from wsi_mmm import errors
from wsi_mmm.errors import InputError, NotFound, SlideNotFound, StorageError, TransientCause, TransientError, WsiError
from wsi_mmm.slides.registry import open_slide
from wsi_mmm.storage.store import read_bytes


def drawn_tree() -> dict[str, str]:
    """Error -> its base, as the docstring draws them."""
    assert errors.__doc__ is not None
    bases, found = list[str](), dict[str, str]()
    for line in errors.__doc__.splitlines():
        drawn = re.match(r"    (?P<branch>(?:│   |    )*(?:[├└]── )?)(?P<name>[A-Z]\w+) {2,}", line)
        if drawn is not None:
            depth = len(drawn["branch"]) // 4
            bases[depth:] = [drawn["name"]]
            found[drawn["name"]] = bases[depth - 1] if depth else "Exception"
    return found


def test_the_drawn_tree_is_the_tree() -> None:
    """Every class, and its base."""
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert {kind.__name__: kind.__bases__[0].__name__ for kind in classes} == drawn_tree()
    assert all(issubclass(kind, WsiError) for kind in classes)


def test_only_a_slide_is_a_slide_that_is_not_found(tmp_path: Path) -> None:
    """Opening a slide says so; another object that is missing is none, and no input."""
    missing = str(tmp_path / "none.svs")
    with pytest.raises(SlideNotFound, match=r"none\.svs"):
        open_slide(missing)
    with pytest.raises(SlideNotFound, match=r"none\.svs"):
        open_slide(missing, reader="tiffslide")
    with pytest.raises(NotFound) as caught:
        read_bytes(missing)
    assert isinstance(caught.value, StorageError) and not isinstance(caught.value, InputError)


def test_a_transient_error_keeps_its_cause_on_its_way() -> None:
    """Between processes too; the text is one line for people."""
    error = pickle.loads(pickle.dumps(TransientError("busy", TransientCause.OVERLOADED)))
    assert (str(error), error.cause) == ("busy", TransientCause.OVERLOADED)
    assert issubclass(TransientError, wsi_mmm.WsiError)
