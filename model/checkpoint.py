"""Reading a checkpoint, whole or by rows, whatever layout it was written from.

No format of the stored tensors detects flipped bits by itself, so every file's SHA-256 is compared
with the manifest's. Nothing is ever unpickled.
"""

import json
import struct
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.checkpoint_folder import committed, latest, read_manifest
from model.checkpoint_manifest import (
    MANIFEST_NAME,
    CheckpointError,
    CheckpointInfo,
    Manifest,
    Piece,
    TensorRecord,
)
from model.data_order import Cursor
from model.durable_files import file_sha256
from model.parameter import ParameterRows
from model.vocabulary import Vocabulary

__all__ = ["Checkpoint", "CheckpointError", "CheckpointInfo", "Cursor", "committed", "latest"]

# A million empty tensors would take 1.5 GB to list; ours are a few hundred.
_MAX_HEADER_BYTES = 1 << 20
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")
_STORED_NAMES = {"float32": "F32", "float64": "F64"}
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Checkpoint:
    """A committed checkpoint, open for reading; made by `Checkpoint.open`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self._manifest = manifest

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> "Checkpoint":
        """Open a checkpoint, or the newest one of a folder of checkpoints.

        With `verify` every file is read once and its SHA-256 compared. Raises CheckpointError when
        anything of it is missing, damaged, of another version, or not a checkpoint at all.
        """
        path = _resolve(path)
        manifest = read_manifest(path)
        checkpoint = cls(path, manifest)
        for name in manifest.files:
            checkpoint._check_file(name, verify)
        for name in sorted({p.file for t in manifest.tensors.values() for p in t.pieces}):
            checkpoint._check_part(name)
        return checkpoint

    @property
    def info(self) -> CheckpointInfo:
        """Where in which training it was taken."""
        return self._manifest.info

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows [start, stop) of a parameter on the CPU, from the files that hold them."""
        record = self._record(name)
        stop = record.shape[0] if stop is None else stop
        if not 0 <= start <= stop <= record.shape[0]:
            raise CheckpointError(
                f"{self.path}: {name} has rows 0 to {record.shape[0]}, not {start} to {stop}"
            )
        rows = torch.empty((stop - start, *record.shape[1:]), dtype=_DTYPES[record.dtype])
        for piece in record.pieces:
            low, high = max(piece.start, start), min(piece.stop, stop)
            if low < high:
                rows[low - start : high - start] = self._read_piece(piece, low, high)
        return rows

    def read_rows(self, rows: ParameterRows) -> Tensor:
        """Return the rows that a rank holds; CheckpointError when its model has other sizes."""
        shape = self._record(rows.name).shape
        if shape != rows.shape:
            raise CheckpointError(
                f"{self.path}: {rows.name} has shape {shape} and the model to load it into has "
                f"{rows.shape}; use the sizes of the checkpoint's config.yaml"
            )
        return self.read(rows.name, rows.start, rows.stop)

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters, whole, in the model's order."""
        return {name: self.read(name) for name in self.info.model.parameter_shapes()}

    def vocabulary(self, side: Literal["source", "target"]) -> Vocabulary:
        """Return the vocabulary of a side; CheckpointError when it does not fit the model."""
        vocabulary = Vocabulary.from_bytes(self.file(f"{side}_vocabulary.json"))
        model = self.info.model
        sizes = {"source": model.source_vocabulary_size, "target": model.target_vocabulary_size}
        if len(vocabulary) != sizes[side]:
            raise CheckpointError(
                f"{self.path}: the {side} vocabulary has {len(vocabulary)} words and the model "
                f"{sizes[side]}; the checkpoint was not written whole"
            )
        return vocabulary

    def file(self, name: str) -> bytes:
        """Return the contents of a file that was committed with the tensors."""
        if name not in self._manifest.files:
            raise CheckpointError(f"{self.path} has no {name}; {_list(self._manifest.files)}")
        return (self.path / name).read_bytes()

    def _record(self, name: str) -> TensorRecord:
        if name not in self._manifest.tensors:
            raise CheckpointError(f"{self.path} has no {name}; {_list(self._manifest.tensors)}")
        return self._manifest.tensors[name]

    def _read_piece(self, piece: Piece, start: int, stop: int) -> Tensor:
        path = self.path / piece.file
        try:
            with safe_open(path, framework="pt") as part:
                rows: Tensor = part.get_slice(piece.key)[start - piece.start : stop - piece.start]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {_one_line(error)}") from None
        return rows

    def _check_file(self, name: str, verify: bool) -> None:
        path, record = self.path / name, self._manifest.files[name]
        try:
            size = path.stat().st_size
            if size != record.bytes:
                raise _damaged(path, f"it has {size} bytes and was written with {record.bytes}")
            if verify and file_sha256(path) != record.sha256:
                raise _damaged(path, "its contents do not match their SHA-256 in the manifest")
        except FileNotFoundError:
            raise _damaged(path, "it is missing") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None

    def _check_part(self, name: str) -> None:
        """Compare a part's own header with the manifest: same tensors, shapes and formats."""
        path = self.path / name
        header = _read_header(path)
        expected = {
            piece.key: [_STORED_NAMES[t.dtype], [piece.stop - piece.start, *t.shape[1:]]]
            for t in self._manifest.tensors.values()
            for piece in t.pieces
            if piece.file == name
        }
        stored = {key: [entry.get("dtype"), entry.get("shape")] for key, entry in header.items()}
        if extra := sorted(stored.keys() - expected.keys()):
            raise _damaged(path, f"it holds {extra[0]}, which is not in the manifest")
        for key, kind in expected.items():
            if stored.get(key) != kind:
                raise _damaged(path, f"{key} is {stored.get(key)} in it and {kind} in the manifest")


def _resolve(path: Path) -> Path:
    if path.is_file():
        raise CheckpointError(f"{path} is {_file_kind(path)}; give the checkpoint's folder")
    if not path.is_dir():
        raise CheckpointError(f"{path} is not there; give a checkpoint's folder")
    if (path / MANIFEST_NAME).exists():
        return path
    newest = latest(path)
    if newest is None:
        raise CheckpointError(
            f"{path} is no checkpoint: it has no {MANIFEST_NAME} and no step-… folder with one; "
            "give the folder that a training run names as its checkpoint"
        )
    return newest


def _file_kind(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(_PICKLE_STARTS):
        return "a pickle file, which is never loaded since it could run any code"
    return "a file"


def _read_header(path: Path) -> dict[str, dict[str, Any]]:
    with path.open("rb") as file:
        start = file.read(8)
        num_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < num_bytes <= _MAX_HEADER_BYTES:
            raise _damaged(path, f"its header has {num_bytes} bytes of {_MAX_HEADER_BYTES} allowed")
        data = file.read(num_bytes)
    try:
        header = json.loads(data, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid ({_one_line(error)})") from None
    if not isinstance(header, dict) or not all(isinstance(e, dict) for e in header.values()):
        raise _damaged(path, "its header is not a table of tensors")
    header.pop("__metadata__", None)
    return header


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # safetensors itself would take the last of two tensors of one name.
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a name stands there twice")
    return dict(pairs)


def _damaged(path: Path, fact: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {fact}; use another checkpoint")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _list(names: object) -> str:
    shown = sorted(names)[:20] if isinstance(names, dict) else []
    return f"it has {', '.join(shown)}"
