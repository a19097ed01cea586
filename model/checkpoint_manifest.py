"""The manifest: the index that makes some files a checkpoint, and its form as JSON.

It says where in training the checkpoint was taken, which files belong to it with their SHA-256, and
which rows of which parameter lie in which file. It carries a checksum of itself, so that a flipped
bit in it is found like one in a tensor.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from model.data_order import Cursor
from model.errors import UserError
from model.network import ModelConfig

MANIFEST_NAME = "manifest.json"
FORMAT = "baton-checkpoint"
VERSION = 1

Count = Annotated[int, Field(ge=0)]
# A plain name: a manifest must not be able to point outside its folder.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,199}$")]
Dtype = Literal["float32", "float64"]


class CheckpointError(UserError):
    """A checkpoint cannot be written or read; the message says which, why, and what to do."""


@dataclass(frozen=True)
class CheckpointInfo:
    """Where in which training a checkpoint was taken.

    `step` counts finished updates, `num_pairs` and `num_words` (source and target, padding not
    counted) what they have read; `cursor` is the next batch to train on. `attempt` is the fencing
    number: it grows with every life of the run `run_id` (MLflow's), and a commit of an older life
    is refused.
    """

    step: Count
    cursor: Cursor
    model: ModelConfig
    reverse_source: bool
    precision: str
    seed: int
    corpus_fingerprint: str
    num_pairs: Count = 0
    num_words: Count = 0
    run_id: str | None = None
    attempt: Count = 0


@dataclass(frozen=True)
class FileRecord:
    """What a file of the checkpoint must be: its SHA-256 in hexadecimal and its length."""

    sha256: str
    bytes: Count


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a parameter: the tensor `key` of the safetensors file `file`."""

    file: FileName
    key: str
    start: Count
    stop: Count


@dataclass(frozen=True)
class TensorRecord:
    """A whole parameter: shape, number format, and pieces in the order of their rows."""

    shape: tuple[Count, ...]
    dtype: Dtype
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything that the manifest says."""

    info: CheckpointInfo
    files: dict[FileName, FileRecord]
    tensors: dict[str, TensorRecord]

    def to_bytes(self) -> bytes:
        """Return the JSON document, with its checksum."""
        document = {"format": FORMAT, "version": VERSION, **_adapter.dump_python(self, mode="json")}
        document["sha256"] = _checksum(document)
        return json.dumps(document, indent=1, sort_keys=True).encode()

    @staticmethod
    def from_bytes(data: bytes) -> "Manifest":
        """Read what `to_bytes` wrote; CheckpointError says what is wrong, but not with which file.

        Whether the pieces make up the parameters of the model is checked as well.
        """
        document = _document(data)
        if document.pop("sha256", None) != _checksum(document):
            raise CheckpointError("is damaged: its contents do not match its checksum")
        try:
            manifest = _adapter.validate_json(json.dumps(document), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"is not valid: {where}: {first['msg']}") from None
        if problem := coverage_problem(manifest.info.model, manifest.tensors):
            raise CheckpointError(f"is not valid: {problem}")
        for piece in (p for record in manifest.tensors.values() for p in record.pieces):
            if piece.file not in manifest.files:
                raise CheckpointError(f"is not valid: {piece.key} lies in unlisted {piece.file}")
        return manifest


_adapter = TypeAdapter(Manifest)


def coverage_problem(model: ModelConfig, tensors: Mapping[str, TensorRecord]) -> str | None:
    """Return what keeps the tensors from being exactly the model's parameters; None if nothing."""
    # Before anything that is as long as the number of layers, which comes from outside.
    if model.num_layers > len(tensors):
        return f"{len(tensors)} tensors cannot be the parameters of {model.num_layers} layers"
    shapes = model.parameter_shapes()
    if missing := sorted(shapes.keys() - tensors.keys()):
        return f"{missing[0]} is missing"
    if extra := sorted(tensors.keys() - shapes.keys()):
        return f"{extra[0]} is no parameter of the model"
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            return f"{name} has shape {tensors[name].shape}; the model's sizes make it {shape}"
        if problem := _rows_problem(name, shape[0], tensors[name].pieces):
            return problem
    return None


def _rows_problem(name: str, num_rows: int, pieces: Iterable[Piece]) -> str | None:
    """Pieces must come in the order of their rows."""
    row = 0
    for piece in pieces:
        if piece.start > row:
            return f"rows {row} to {piece.start} of {name} are in no part"
        if piece.start < row:
            return f"rows {piece.start} to {min(row, piece.stop)} of {name} are in two parts"
        if piece.stop <= piece.start:
            return f"a piece of {name} goes from row {piece.start} to row {piece.stop}"
        row = piece.stop
    if row != num_rows:
        return f"{name} has {num_rows} rows and its pieces end at row {row}"
    return None


def _document(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise CheckpointError("is damaged: it is not a JSON document") from None
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise CheckpointError(f"is not a checkpoint's: it does not say that its format is {FORMAT}")
    version = document.pop("version", None)
    if version != VERSION:
        raise CheckpointError(
            f"has format version {version!r} and this program reads version {VERSION}; "
            "use the program's version that wrote it"
        )
    return document


def _checksum(document: dict[str, Any]) -> str:
    known = {key: value for key, value in document.items() if key not in ("format", "version")}
    text = json.dumps(known, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
