"""The rules of docs/architecture.md about who may import whom."""

import ast
from pathlib import Path

import pytest

PIPELINE = Path(__file__).parents[1] / "pipeline"
STAGES = ("extract", "train", "evaluate", "report")
# What a plan must know of the texts is a function of files that needs none of the extraction stage.
ALLOWED = {("plan.py", "pipeline.extract.python_text"), ("plan.py", "pipeline.extract.local_text")}


def imports(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", sorted(PIPELINE.rglob("*.py")), ids=lambda path: str(path.relative_to(PIPELINE)))
def test_imports(path: Path) -> None:
    name = path.relative_to(PIPELINE)
    modules = imports(path)
    assert not any(module.split(".")[0] == "prefect" for module in modules)
    assert not any(module.split(".")[0] in ("pickle", "dill", "cloudpickle") for module in modules)
    stages_it_may_import = STAGES if name.name == "cli.py" else (name.parts[0],)
    for stage in STAGES:
        reached = {module for module in modules if module.startswith(f"pipeline.{stage}.")}
        reached -= {
            module for file, allowed in ALLOWED if file == str(name) for module in reached if module.startswith(allowed)
        }
        assert not reached or stage in stages_it_may_import, f"{name} imports {sorted(reached)}"


def test_no_module_is_long() -> None:
    lengths = {str(path.relative_to(PIPELINE)): len(path.read_text().splitlines()) for path in PIPELINE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
