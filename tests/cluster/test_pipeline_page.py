"""What docs/pipeline.md shows is what its commands make now: pictures, figures, examples."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from cluster import cli

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")
DRAWN = {
    match[2]: shlex.split(match[1])
    for match in re.finditer(r"^baton (simulate .* --draw (docs/pictures/\S+))$", TEXT, re.M)
}
PAPER = "simulate configs/paper.yaml"


class Figure(NamedTuple):
    """A speedup in one of the page's tables, and the command that is said to give it."""

    command: str
    speedup: str


def figures() -> Iterator[Figure]:
    """Read the tables: code in the heading goes before that in a row's first cell."""
    for table in re.findall(r"(?:^\|.*\n)+", TEXT, re.M):
        heading, _, *rows = (
            [c.strip() for c in line.split("|")[1:-1]] for line in table.split("\n")[:-1]
        )
        if not {"speedup", "M=1"} & set(heading):
            continue
        shared = " ".join(re.findall(r"`([^`]+)`", heading[0])).replace(f"baton {PAPER}", "")
        for row in rows:
            arguments = f"{PAPER} {shared} {' '.join(re.findall(r'`([^`]+)`', row[0]))}"
            for name, cell in zip(heading[1:], row[1:], strict=True):
                count = f" --microbatches {name[2:]}" if name.startswith("M=") else ""
                yield Figure(" ".join((arguments + count).split()), cell)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder that has the configurations and nothing else."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(arguments: list[str]) -> str:
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_picture_is_on_the_page_with_its_command() -> None:
    there = {f"docs/pictures/{path.name}" for path in (ROOT / "docs" / "pictures").iterdir()}
    shown = {f"docs/{link}" for link in re.findall(r"!\[[^]]+\]\(([^)]+)\)", TEXT)}
    assert there == shown == set(DRAWN)


@pytest.mark.parametrize("picture", sorted(DRAWN), ids=lambda picture: Path(picture).stem)
def test_pictures_are_what_their_commands_draw(picture: str, folder: Path) -> None:
    run(DRAWN[picture])
    assert (folder / picture).read_bytes() == (ROOT / picture).read_bytes(), "run `make pictures`"


@pytest.mark.parametrize("figure", list(figures()), ids=lambda figure: figure.command[28:])
def test_figures_are_what_their_commands_print(figure: Figure, folder: Path) -> None:
    if "latency.json" in figure.command:
        run_the_pages_python()
    found = json.loads(run([*figure.command.split(), "--json"]).splitlines()[-1])
    assert f"{found['speedup']:.2f}" == figure.speedup


def test_the_placement_by_hand_is_one(folder: Path) -> None:
    (yaml,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.S)
    (folder / "my_layout.yaml").write_text(yaml)
    assert "3 ranks (placement my_layout)" in run([*PAPER.split(), "--placement", "my_layout.yaml"])


def run_the_pages_python() -> None:
    (source,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    exec(compile(source, "docs/pipeline.md", "exec"), {})
