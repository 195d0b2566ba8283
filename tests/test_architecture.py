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
# What users call: it reaches every stage.
FRONTS = ("cli.py", "__init__.py")
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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PIPELINE)))
def test_imports(path: Path) -> None:
    name, modules = path.relative_to(PIPELINE), imports(path)
    for never in ("prefect", "flows", "tests", "pickle", "dill", "cloudpickle"):
        assert not any(inside(module, never) for module in modules), f"{name} imports {never}"
    if str(name) in FRONTS:
        return
    for stage in STAGES:
        reached = {module for module in modules if inside(module, f"pipeline.{stage}")}
        assert not reached or stage == name.parts[0], f"{name} imports {sorted(reached)}"


def test_the_map_is_that_of_the_code() -> None:
    assert MAP["rewritten"](PAGE) == PAGE, "run: python docs/import_map.py"


def test_no_circle_of_imports_is_hidden_in_a_package() -> None:
    floors = MAP["floors"](MAP["imports_of_files"]())  # raises CycleError where there is one
    assert floors["flows.py"] == max(floors.values())


def test_the_stages_are_the_packages_that_are_not_shared() -> None:
    assert {path.parent.name for path in MODULES if path.parent != PIPELINE} == {*STAGES, "store", "texts"}


def test_no_module_is_long() -> None:
    modules = [*MODULES, *ORCHESTRATION, ROOT / "flows.py", ROOT / "experiment.py"]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in modules}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


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
