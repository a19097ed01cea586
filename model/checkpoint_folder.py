"""The folder of a run's checkpoints: their names, which are committed, and each one's manifest.

A checkpoint `step-00001234` is committed if and only if it holds a manifest; folders in the making
or on their way out have hidden names.
"""

import re
from pathlib import Path

from model.checkpoint_manifest import MANIFEST_NAME, CheckpointError, Manifest

_NAME = re.compile(r"^step-(\d{8,})$")
_MAX_MANIFEST_BYTES = 16 << 20


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint of a step."""
    return f"step-{step:08d}"


def committed(directory: Path) -> list[Path]:
    """Return the committed checkpoints in a folder, newest step first; none if it is not there."""
    steps: list[tuple[int, Path]] = []
    for path in directory.iterdir() if directory.is_dir() else ():
        match = _NAME.match(path.name)
        if match and (path / MANIFEST_NAME).is_file():
            steps.append((int(match[1]), path))
    return [path for _, path in sorted(steps, reverse=True)]


def latest(directory: Path) -> Path | None:
    """Return the newest committed checkpoint in a folder, or None; whether it is intact is open."""
    return next(iter(committed(directory)), None)


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of a checkpoint; CheckpointError names the file and what is wrong."""
    name = path / MANIFEST_NAME
    try:
        with name.open("rb") as file:
            data = file.read(_MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror}") from None
    if len(data) > _MAX_MANIFEST_BYTES:
        raise CheckpointError(
            f"{name} has more than {_MAX_MANIFEST_BYTES} bytes; it is no manifest of a checkpoint"
        )
    try:
        return Manifest.from_bytes(data)
    except CheckpointError as error:
        raise CheckpointError(f"{name} {error}") from None
