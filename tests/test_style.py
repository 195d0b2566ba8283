"""The rules of docs/style.md that a machine can check: one legend for the shapes in names."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/style.md").read_text(encoding="utf-8")
LETTERS = re.findall(r"^\| `([A-Za-z])` \|", PAGE, re.MULTILINE)
SHAPED = re.compile(r"(?:W|\w*[a-z]\w*)_([A-Za-z0-9]*[A-Z][A-Za-z0-9]*)")
"""A name with a shape: words with a small letter in them, or W, and a last part with a capital."""


def shapes(path: Path) -> dict[str, str]:
    """The shaped names of a module, and their shapes."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                names.add(name)
    return {name: found[1] for name in sorted(names) if (found := SHAPED.fullmatch(name))}


def test_a_letter_of_the_legend_has_one_meaning() -> None:
    assert len(LETTERS) == len(set(LETTERS)) > 10


@pytest.mark.parametrize("path", sorted((ROOT / "pipeline").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_shapes_are_spelt_with_the_legend(path: Path) -> None:
    unknown = [name for name, shape in shapes(path).items() if not set(re.sub(r"\d", "", shape)) <= set(LETTERS)]
    assert unknown == [], "docs/style.md has no such letter"
