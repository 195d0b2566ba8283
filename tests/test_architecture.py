"""The rules of docs/architecture.md about who may import whom, and that its table of modules is complete."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIPELINE = ROOT / "pipeline"
MODULES = sorted(PIPELINE.rglob("*.py"))
ORCHESTRATION = sorted((ROOT / "orchestration").glob("*.py"))
STAGES = ("extract", "train", "evaluate", "report")
# What users call: it reaches every stage.
FRONTS = ("cli.py", "__init__.py")
# What a plan must know of the texts is a function of files that needs none of the extraction stage.
ALLOWED = {("plan.py", "pipeline.extract.python_text"), ("plan.py", "pipeline.extract.local_text")}


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
    allowed = {module for file, module in ALLOWED if file == str(name)}
    for stage in STAGES:
        reached = {module for module in modules if inside(module, f"pipeline.{stage}")}
        reached = {module for module in reached if not any(inside(module, exception) for exception in allowed)}
        assert not reached or stage == name.parts[0], f"{name} imports {sorted(reached)}"


def test_the_stages_are_the_packages_that_are_not_the_store() -> None:
    assert {path.parent.name for path in MODULES if path.parent != PIPELINE} == {*STAGES, "store"}


def test_no_module_is_long() -> None:
    modules = [*MODULES, *ORCHESTRATION, ROOT / "flows.py", ROOT / "experiment.py"]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in modules}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_the_table_of_modules_names_every_one_and_no_other() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*`) \| (.*) \|$", page.partition("| module | owns |")[2].partition("\n\n")[0], re.MULTILINE)
    named: set[str] = set()
    for where, owns in rows:
        for name in re.findall(r"`([^`]+)`", where):
            words = re.findall(r"`(\w+)`", owns)
            named |= {f"{name}{word}.py" for word in words} if name.endswith("/") else {name}
    existing = {path.relative_to(PIPELINE).as_posix() for path in MODULES if path.name != "__init__.py"}
    around_prefect = {f"orchestration/{path.name}" for path in ORCHESTRATION if path.name != "__init__.py"}
    assert named == existing | around_prefect | {"__init__.py", "flows.py"}
