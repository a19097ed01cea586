"""Files that survive a crash: what is written here is on the disk before the call returns.

Neither Python's files nor safetensors wait for the disk, so that after a power cut a file that was
renamed into place may be empty. Every write here is followed by fsync of the file, and every change
of a folder's entries by fsync of the folder.
"""

import hashlib
import os
import shutil
from pathlib import Path

_READ_BYTES = 1 << 20


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has its contents; its name needs `sync_folder`."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Wait until the disk has the contents of a file that something else has written."""
    _sync(path, os.O_RDONLY)


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names of a folder's entries."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def publish_folder(staging: Path, final: Path) -> None:
    """Rename a finished folder to its final name: others see all of it or none.

    What had that name before is moved aside first, and deleted afterwards. The files in the folder
    must be durable already; both names must be on one filesystem.
    """
    sync_folder(staging)
    aside = _hide(final) if final.exists() else None
    staging.rename(final)
    sync_folder(final.parent)
    if aside is not None:
        shutil.rmtree(aside)


def remove_folder(path: Path) -> None:
    """Delete a folder with its files; a crash on the way leaves only a hidden `.NAME.removed.tmp`.

    Whoever looks the folder up by its name thus never finds a part of it.
    """
    shutil.rmtree(_hide(path))


def _hide(path: Path) -> Path:
    hidden = path.with_name(f".{path.name}.removed.tmp")
    if hidden.exists():
        shutil.rmtree(hidden)
    path.rename(hidden)
    sync_folder(path.parent)
    return hidden


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's contents in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
