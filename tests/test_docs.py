"""What the docs name is there, and what is there is named."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LAYERS = ("model", "pipeline", "cluster")


@pytest.mark.parametrize("layer", LAYERS)
def test_the_architecture_has_a_word_on_every_file(layer: str) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    modules = {path.name for path in (ROOT / layer).rglob("*.py")} - {"__init__.py"}
    assert sorted(name for name in modules if f"`{name}`" not in page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_and_links_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    folders = "|".join((*LAYERS, "configs", "tests", "docs"))
    named = re.findall(rf"`((?:{folders})/[\w./-]*(?:\.\w+|/))`", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [link for link in links if not (page.parent / link).exists()]
    assert missing == []
