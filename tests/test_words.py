"""The vocabulary of the code: names that can be searched for, docstrings in plain English.

``python tests/test_words.py`` prints what the tests count.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "wsi_mmm"
MOST_ONE_WORD = 0.10
"""Share of all functions that may be private and named by one word: such names tell a reader nothing when searched."""

BANNED = {
    "subject", "case", "patch", "piece", "square", "packet", "call", "micro", "lane", "work", "works", "errand",
    "receipt", "note", "payload", "order", "street", "carry", "desk", "finding", "told", "lap", "ledger", "hand",
    "truth", "lesson", "figure", "passing",
}  # fmt: skip
"""Words that stand for something which has another name here: see the table in docs/architecture.md."""

ALLOWED = {"WorkUnit", "any_case", "truth", "note"}
"""The name of the smallest scheduled thing, keys of training files, and a public name of before."""

_OPENS_BADLY = re.compile(r"(?i)(what|which|where|whether|those|whoever)\b")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> Iterator[tuple[Path, ast.Module]]:
    """Every module of the package, parsed."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE), ast.parse(path.read_text(encoding="utf-8"))


def words_of(name: str) -> set[str]:
    """``read_tiles`` and ``TileReader`` in lower-case words."""
    return {word.lower() for part in name.split("_") for word in _WORD.findall(part)}


def defined_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Names that a module gives to functions, classes, parameters, variables and attributes, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | Function):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def public_types(tree: ast.Module) -> Iterator[str]:
    """Public classes and type aliases of a module."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if re.fullmatch(r"[A-Z]\w*[a-z]\w*", name) and "_" not in name:
                yield name


def one_word_private(tree: ast.Module) -> tuple[int, list[str]]:
    """How many functions a module has, and the private ones named by one word."""
    names = [node.name for node in ast.walk(tree) if isinstance(node, Function)]
    return len(names), [name for name in names if re.fullmatch(r"_[a-z0-9]+", name)]


def doubled_types() -> dict[str, list[str]]:
    """Public type names that several modules define, with the modules."""
    homes: dict[str, list[str]] = defaultdict(list)
    for path, tree in modules():
        for name in public_types(tree):
            if not name.startswith("_"):
                homes[name].append(str(path))
    return {name: found for name, found in homes.items() if len(found) > 1}


def bad_openings() -> list[str]:
    """Public docstrings that begin with a relative pronoun."""
    found = []
    for path, tree in modules():
        for node in [tree, *ast.walk(tree)]:
            if isinstance(node, ast.Module | ast.ClassDef | Function) and (text := ast.get_docstring(node)):
                name = getattr(node, "name", "module")
                if not name.startswith("_") and _OPENS_BADLY.match(text):
                    found.append(f"{path}: {name}: {text.splitlines()[0]}")
    return sorted(set(found))


def banned_names() -> list[str]:
    """Identifiers that hold a banned word."""
    return [
        f"{path}:{line}: {name}"
        for path, tree in modules()
        for name, line in defined_names(tree)
        if not name.startswith("__") and name not in ALLOWED and words_of(name) & BANNED
    ]


def test_no_public_type_is_defined_twice() -> None:
    """One name, one definition: searching for a type finds it."""
    assert doubled_types() == {}


def test_few_private_functions_are_named_by_one_word() -> None:
    """Under a tenth of all functions."""
    counts = [one_word_private(tree) for _, tree in modules()]
    assert sum(len(names) for _, names in counts) < MOST_ONE_WORD * sum(count for count, _ in counts)


def test_public_docstrings_open_in_plain_english() -> None:
    """None begins with what, which, where, whether, those or whoever."""
    assert bad_openings() == []


def test_banned_words_are_in_no_identifier() -> None:
    """The vocabulary's other column is absent."""
    assert banned_names() == []


def test_the_checks_see_what_they_are_for() -> None:
    """On a module that breaks each rule, each check says so."""
    tree = ast.parse('class ReadOrder:\n    """Which one."""\n\n    def _key(self, truth): ...\n\nIndex = int\n')
    assert list(public_types(tree)) == ["ReadOrder", "Index"]
    assert one_word_private(tree) == (1, ["_key"])
    assert {name for name, _ in defined_names(tree) if words_of(name) & BANNED} == {"ReadOrder", "truth"}
    assert _OPENS_BADLY.match("Which one.") and not _OPENS_BADLY.match("Whichever one.")


if __name__ == "__main__":
    counts = [(str(path), *one_word_private(tree)) for path, tree in modules()]
    total, ones = sum(count for _, count, _ in counts), sum(len(names) for _, _, names in counts)
    print(f"functions {total}, private ones of one word {ones} ({ones / total:.1%})")
    for path, _, names in counts:
        if names:
            print(f"  {path}: {', '.join(names)}")
    print(*(f"defined twice: {name} in {', '.join(found)}" for name, found in doubled_types().items()), sep="\n")
    print(*(f"docstring: {line}" for line in bad_openings()), sep="\n")
    print(*(f"word: {line}" for line in banned_names()), sep="\n")
