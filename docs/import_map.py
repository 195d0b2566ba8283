"""Draws who imports whom in architecture.md: `python docs/import_map.py`, after a change of the imports.

A package is drawn as one, the files directly in `pipeline/` each by itself. A floor is one above the highest floor that is
imported from; where imports turn in a circle there are no floors, and this says so.
"""

import ast
from collections.abc import Mapping
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("architecture.md")
BEGIN, END = "<!-- drawn by docs/import_map.py -->", "<!-- until here -->"

Imports = dict[str, set[str]]


def imports_of_files() -> Imports:
    """Every module of the product, by its file, and the modules of the product that it imports anywhere."""
    paths = [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("orchestration/*.py"), ROOT / "flows.py", ROOT / "experiment.py"]
    files = {_module(path): path.relative_to(ROOT).as_posix() for path in paths}
    return {file: {files[name] for name in _imported(ROOT / file, files)} for file in sorted(files.values())}


def drawn_together(imports: Imports) -> Imports:
    """The same for what the map shows: packages, and files that are in none."""
    together: Imports = {}
    for file, imported in imports.items():
        together.setdefault(shown(file), set()).update(shown(other) for other in imported)
    return {name: imported - {name} for name, imported in together.items()}


def shown(file: str) -> str:
    """What the map calls a file: its package with a slash, or its name; the two `experiment.py` are told apart."""
    parts = file.split("/")
    if parts[0] != "pipeline":
        return "orchestration/" if parts[0] == "orchestration" else f"./{file}"
    return f"{parts[1]}/" if len(parts) > 2 else parts[1]


def floors(imports: Mapping[str, set[str]]) -> dict[str, int]:
    """The floor of each; raises graphlib.CycleError where imports turn in a circle."""
    floor: dict[str, int] = {}
    for name in TopologicalSorter(imports).static_order():
        floor[name] = 1 + max((floor[other] for other in imports[name]), default=-1)
    return floor


def rewritten(page: str) -> str:
    """The page with the map of today's imports between its two markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    imports = drawn_together(imports_of_files())
    floor = floors(imports)
    lines: list[str] = []
    for number in range(max(floor.values()), -1, -1):
        for place, name in enumerate(sorted(name for name in imports if floor[name] == number)):
            names = "  ".join(sorted(other.removesuffix(".py") for other in imports[name])) or "-"
            lines.append(f"{'' if place else number:>2}  {name:<17} {names}")
    return "\n".join([before + BEGIN, "```text", *lines, "```", END + after])


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _imported(path: Path, files: Mapping[str, str]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(name if name in files else node.module for name in names)
    # What stands under `if TYPE_CHECKING` in the package itself names the modules that its public names come from.
    return {name for name in found if name in files} - {_module(path)} if _module(path) != "pipeline" else set()


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
