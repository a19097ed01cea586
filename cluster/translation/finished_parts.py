"""The folder beside an output file that keeps its finished parts until all of them are there.

`OUTPUT.parts/` holds a manifest, which says of what input, checkpoint and settings the parts are
translations, and a file for each finished part. A part's file has its name only once the disk has
its contents, so a run that was killed at any moment goes on from what the folder holds. The output
file itself appears whole or not at all. A folder of that name that holds other files and not our
manifest is somebody else's: nothing is written into it. No file but our own is ever deleted.
"""

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cluster.translation.lines import InputError
from cluster.translation.parts import InputParts, Part
from model.durable_files import sync_file, sync_folder, write_durably
from model.errors import UserError
from pipeline.json_file import read_json, write_json

_KIND, _VERSION = "translation", 1
_MANIFEST, _STAGED_OUTPUT = "manifest.json", "output.tmp"
_OUR_FILES = re.compile(rf"part-\d{{6,}}\.(json|tmp)|{_STAGED_OUTPUT}|{_MANIFEST}(\.part)?")


class ResumeError(UserError):
    """What an interrupted translation left behind belongs to another one, or is still in use."""


class FinishedParts:
    """The finished parts of one output file; made by `FinishedParts.open`."""

    def __init__(self, folder: Path, output: Path, parts: InputParts) -> None:
        self._folder, self._output, self._parts = folder, output, parts

    @classmethod
    @contextmanager
    def open(
        cls, output: Path, parts: InputParts, settings: Mapping[str, object], *, restart: bool
    ) -> Iterator["FinishedParts"]:
        """Make the folder, or find what an earlier run of the same input and settings finished.

        `settings` are all that decides what the output is; with `restart`, what is there is
        deleted. Raises ResumeError when the folder is of other settings, in use by another process
        or not one of ours, InputError when it cannot be written.
        """
        folder = output.with_name(output.name + ".parts")
        identity = {"input_sha256": parts.sha256, "num_lines": parts.num_lines, **settings}
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise _not_writable(output, error) from None
        with _alone(folder):
            manifest = folder / _MANIFEST
            found = None
            if manifest.exists():
                found = read_json(manifest, _KIND, _VERSION, ResumeError)
            else:
                _check_ours(folder)
            if restart or found is None:
                _empty(folder, output)
                write_json(manifest, _KIND, _VERSION, identity)
            else:
                _check_same(folder, found, identity)
            yield cls(folder, output, parts)

    def missing(self) -> list[Part]:
        """Return the parts that are not finished, in order."""
        return [part for part in self._parts.parts if not self._path(part.number).exists()]

    def add(self, number: int, lines: Mapping[int, str]) -> None:
        """Keep a finished part: what to write for each of its lines, by the line's number."""
        path = self._path(number)
        staging = path.with_suffix(".tmp")
        try:
            write_durably(staging, json.dumps(list(lines.items())).encode())
            staging.replace(path)
            sync_folder(self._folder)
        except OSError as error:
            raise _not_writable(self._output, error) from None

    def assemble(self) -> None:
        """Write the output file in the order of the input, and delete the folder."""
        staging = self._folder / _STAGED_OUTPUT
        try:
            with staging.open("w", encoding="utf-8", newline="\n") as file:
                for window in self._parts.windows():
                    lines = dict(line for part in window for line in self._read(part.number))
                    file.writelines(lines[number] for number in sorted(lines))
            sync_file(staging)
            staging.replace(self._output)
            sync_folder(self._output.absolute().parent)
            _empty(self._folder, self._output)
            if not any(self._folder.iterdir()):
                self._folder.rmdir()
        except OSError as error:
            raise _not_writable(self._output, error) from None

    def _read(self, number: int) -> list[tuple[int, str]]:
        path = self._path(number)
        try:
            return [(int(line), str(text)) for line, text in json.loads(path.read_bytes())]
        except ValueError:
            raise ResumeError(
                f"{path} is damaged; delete it and repeat the command, which translates it again"
            ) from None

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:06d}.json"


def _empty(folder: Path, output: Path) -> None:
    """Delete what was finished, and then the manifest: while there are parts it says whose."""
    try:
        for name in _our_files(folder) - {_MANIFEST}:
            (folder / name).unlink()
        sync_folder(folder)
        (folder / _MANIFEST).unlink(missing_ok=True)
        sync_folder(folder)
    except OSError as error:
        raise _not_writable(output, error) from None


def _our_files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if _OUR_FILES.fullmatch(path.name)}


def _check_ours(folder: Path) -> None:
    """Raise ResumeError if a folder without a manifest holds what no translation left there."""
    others = sorted({path.name for path in folder.iterdir()} - _our_files(folder))
    if others:
        raise ResumeError(
            f"{folder} holds {others[0]!r}, which no translation made, and is where finished parts "
            "are to be kept; move it away, or give another --output"
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder; a process that dies leaves it open to others."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResumeError(
                f"another process is writing into {folder}; wait for it to end, or give another "
                "--output"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _check_same(folder: Path, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different:
        changes = ", ".join(f"{name} {found.get(name)} -> {wanted[name]}" for name in different)
        raise ResumeError(
            f"{folder} holds parts of another translation ({changes}); repeat the command that "
            "began it, or delete what it finished with --restart"
        )


def _not_writable(output: Path, error: OSError) -> InputError:
    return InputError(f"--output {output}: {error.strerror}; give a file that can be written, or -")
