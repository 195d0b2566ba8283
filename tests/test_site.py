"""What `make docs` and the hooks are made from, held against the code: pages, public names, versions."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipeline

ROOT = Path(__file__).parents[1]
ITEM = r"(?:-|\d+\.) "
PINNED = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def loaded(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def pages(entry: Any) -> list[str]:
    """The pages below an entry of the navigation."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]


def test_every_page_is_in_the_navigation() -> None:
    assert sorted(pages(loaded("mkdocs.yml")["nav"])) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_a_list_is_apart_from_the_text_before_it(page: Path) -> None:
    """GitHub sees a list without a blank line before it; the site would run it into the paragraph."""
    lines = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL).splitlines()
    glued = [line for before, line in pairwise(lines) if re.match(ITEM, line) and not re.match(rf"$|#|  |{ITEM}", before)]
    assert glued == []


def test_the_api_page_has_every_public_name() -> None:
    shown = re.findall(r"^::: pipeline\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(pipeline.__all__)


def test_the_site_asks_no_other_server() -> None:
    site = loaded("mkdocs.yml")
    assert site["theme"]["font"] is False
    assert not {"extra", "extra_css", "extra_javascript"} & set(site)


@pytest.mark.parametrize("hook", ["ruff-check", "ruff-format"])
def test_the_hooks_run_the_ruff_of_make_test(hook: str) -> None:
    (hooks,) = [repo["hooks"] for repo in loaded(".pre-commit-config.yaml")["repos"]]
    (found,) = [each for each in hooks if each["id"] == hook]
    assert found["additional_dependencies"] == [f"ruff=={PINNED['ruff']}"]
