"""Imports go one way: model <- pipeline <- cluster, and Ray and MLflow stay in few places."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "model": {"pipeline", "cluster", "ray", "mlflow"},
    "pipeline": {"cluster", "ray", "mlflow"},
}


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Return the packages that a file imports, also inside functions unless told otherwise."""
    tree = ast.parse(path.read_text())
    packages: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            packages.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            packages.add(node.module.split(".")[0])
    return packages


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_a_layer_does_not_import_what_stands_on_it(layer: str) -> None:
    files = sorted((ROOT / layer).glob("**/*.py"))
    assert len(files) > 5
    for path in files:
        wrong = imported(path) & FORBIDDEN[layer]
        assert not wrong, f"{path.name} imports {sorted(wrong)}"


def test_few_files_import_ray() -> None:
    files = sorted((ROOT / "cluster").glob("**/*.py"))
    with_ray = [path.name for path in files if "ray" in imported(path, top_level_only=True)]
    assert 2 * len(with_ray) < len(files), with_ray


def test_project_code_uses_no_pickle() -> None:
    for layer in ("model", "pipeline", "cluster"):
        for path in sorted((ROOT / layer).glob("**/*.py")):
            assert not imported(path) & {"pickle", "cloudpickle", "dill"}, path.name
