"""Small JSON files with a format and a version: written whole or not at all, read with checks."""

import json
import os
from pathlib import Path
from typing import Any

from model.durable_files import sync_folder, write_durably
from model.errors import UserError


def write_json(path: Path, kind: str, version: int, content: dict[str, Any]) -> None:
    """Write a file of a kind, such as `schedule`; the folder is made if it is not there.

    Raises UserError where it cannot.
    """
    check_writable(path, kind)
    text = json.dumps({"format": f"baton {kind}", "version": version} | content, indent=1)
    staging = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_durably(staging, text.encode() + b"\n")
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as problem:
        raise _cannot_write(path, kind, str(problem.strerror)) from None


def check_writable(path: Path, kind: str) -> None:
    """Raise UserError where a file can surely not be written, before work is put into it."""
    try:
        if not path.name or path.is_dir():
            raise _cannot_write(path, kind, "it is a folder")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
    except (OSError, ValueError) as problem:
        raise _cannot_write(path, kind, str(problem)) from None
    if not folder.is_dir():
        raise _cannot_write(path, kind, f"{folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _cannot_write(path, kind, f"no permission to write into {folder}")


def _cannot_write(path: Path, kind: str, reason: str) -> UserError:
    return UserError(f"cannot write the {kind} file {path}: {reason}; name another file")


def read_json(path: Path, kind: str, version: int, error: type[UserError]) -> dict[str, Any]:
    """Return the content of a file of a kind and version; raises `error`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror}; give a {kind} file") from None
    except ValueError as problem:
        raise error(f"{path} is not JSON ({problem}); give a {kind} file") from None
    if not isinstance(content, dict) or content.get("format") != f"baton {kind}":
        raise error(f"{path} is no baton {kind} file; give one that baton wrote")
    if content.get("version") != version:
        raise error(
            f"{path} has version {content.get('version')!r} of the {kind} file, and this program "
            f"reads version {version}; write it again"
        )
    return content
