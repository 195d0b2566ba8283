"""The rules of docs/architecture.md about who may import whom, and that its map and list of modules are the code's."""

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIPELINE = ROOT / "pipeline"
MODULES = sorted(PIPELINE.rglob("*.py"))
ORCHESTRATION = sorted((ROOT / "orchestration").glob("*.py"))
STAGES = ("extract", "train", "evaluate", "report")
# From top to bottom: imports go downwards. Rooms of one line may use each other, except for the stages, which never do.
FLOORS = (
    ("cli", "foresee", "front", "options", "serve", "tidy", "__init__"),
    STAGES,
    ("study",),
    ("texts", "models", "sae", "store"),
    ("artefacts",),
    ("runtime", "section", "errors"),
)
FLOOR = {room: len(FLOORS) - number for number, rooms in enumerate(FLOORS) for room in rooms}
LONGEST_MODULE, LONGEST_FUNCTION = 400, 60
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
MAP = runpy.run_path(str(ROOT / "docs/import_map.py"))


def imports(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import, which this test could not follow"
            assert node.module
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def room(path: Path) -> str:
    """The package of a module inside `pipeline/`, or its own name for one that lies directly there."""
    return path.relative_to(PIPELINE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PIPELINE)))
def test_imports_go_downwards(path: Path) -> None:
    name, modules = path.relative_to(PIPELINE), imports(path)
    for never in ("prefect", "flows", "tests", "pickle", "dill", "cloudpickle"):
        assert not any(inside(module, never) for module in modules), f"{name} imports {never}"
    own = room(path)
    for module in sorted(module for module in modules if module.startswith("pipeline.")):
        other = module.split(".")[1]
        if other == "__version__" or own == "__init__":
            continue
        assert FLOOR[other] <= FLOOR[own], f"{name} imports {module}, which is on a higher floor"
        assert other == own or not {own, other} <= set(STAGES), f"{name} imports {module}: stages do not know each other"


def test_no_name_stands_twice() -> None:
    names = [path.stem for path in MODULES if path.stem != "__init__"]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_the_map_is_that_of_the_code() -> None:
    assert MAP["rewritten"](PAGE) == PAGE, "run: python docs/import_map.py"


def test_no_circle_of_imports_is_hidden_in_a_package() -> None:
    floors = MAP["floors"](MAP["imports_of_files"]())  # raises CycleError where there is one
    assert floors["flows.py"] == max(floors.values())


def test_every_room_has_its_floor() -> None:
    assert {room(path) for path in MODULES} == set(FLOOR)


def test_modules_and_functions_fit_a_reader() -> None:
    long: list[str] = []
    for path in [*MODULES, *ORCHESTRATION, ROOT / "flows.py", ROOT / "experiment.py"]:
        text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT)
        if len(text.splitlines()) >= LONGEST_MODULE:
            long.append(str(name))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno
                if node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION:
                    long.append(f"{name}: {node.name}")
    assert long == []


def test_every_module_has_its_paragraph_and_no_other_does() -> None:
    part = PAGE.partition("\n## Modules\n")[2].partition("\n## ")[0]
    named: list[str] = []
    for section in re.split(r"\n\n(?=\*\*)", part):
        title = section.partition("\n")[0]
        folder = re.search(r"in `([a-z/]+)`", title)
        for bullet in re.findall(r"^- (.*(?:\n  .*)*)", section, re.MULTILINE):
            assert "Never: " in bullet
            modules = re.findall(r"\*\*`(\w+\.py)`\*\*", bullet)
            assert modules, bullet
            named += [folder[1] + name if folder else name for name in modules]
    existing = [path.relative_to(ROOT).as_posix() for path in [*MODULES, *ORCHESTRATION] if path.name != "__init__.py"]
    fronts = {"pipeline/cli.py": "cli.py"}
    expected = [fronts.get(name, name) for name in existing]
    assert sorted(named) == sorted([*expected, "__init__.py", "flows.py", "experiment.py"])
