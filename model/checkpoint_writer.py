"""Writing a checkpoint: every rank its part into a staging folder, then one atomic commit.

Which rank holds which rows does not matter and is not kept beyond the index: pieces carry their
place in the whole model. The staging folder lies beside the final one under a hidden name, with the
attempt in it, so that a rank that was given up cannot write into the checkpoint of its successors.
"""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint_folder import checkpoint_name, committed, read_manifest
from model.checkpoint_manifest import (
    MANIFEST_NAME,
    CheckpointError,
    CheckpointInfo,
    Dtype,
    FileRecord,
    Manifest,
    Piece,
    TensorRecord,
    coverage_problem,
)
from model.durable_files import (
    file_sha256,
    publish_folder,
    remove_folder,
    sync_file,
    sync_folder,
    write_durably,
)
from model.parameter import ParameterRows

_DTYPES: dict[str, Dtype] = {"torch.float32": "float32", "torch.float64": "float64"}
_HIDDEN = re.compile(r"^\.step-(\d{8,})\..*tmp$")


@dataclass(frozen=True)
class PartRecord:
    """What a rank has written: one file, and the rows in it with their number formats."""

    name: str
    file: FileRecord
    pieces: tuple[tuple[ParameterRows, Dtype], ...]


def part_name(rank: int, num_ranks: int) -> str:
    """Return the name of the file that a rank writes."""
    return f"part-{rank:05d}-of-{num_ranks:05d}.safetensors"


def staging_folder(directory: Path, step: int, attempt: int) -> Path:
    """Return the hidden folder beside the checkpoints in which one is put together."""
    return directory / f".{checkpoint_name(step)}.attempt-{attempt}.tmp"


def prepare_staging(directory: Path, step: int, attempt: int) -> Path:
    """Create the staging folder empty, before any rank writes into it; CheckpointError if not."""
    staging = staging_folder(directory, step, attempt)
    with _explained(staging):
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
        sync_folder(directory)
    return staging


def write_part(
    directory: Path, part: str, pieces: Sequence[tuple[ParameterRows, Tensor]]
) -> PartRecord:
    """Write a rank's pieces (master values) into one file of the staging folder, durably.

    The record goes to whoever commits. CheckpointError when the disk does not take the file.
    """
    held = {rows.key: (rows, value) for rows, value in pieces if rows.stop > rows.start}
    for rows, value in held.values():
        assert value.shape == (rows.stop - rows.start, *rows.shape[1:]), rows
    path = directory / part
    tensors = {key: value.detach().cpu().contiguous() for key, (_, value) in held.items()}
    with _explained(path):
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
        # safetensors makes it for the owner alone; others are to read what stands beside it too.
        path.chmod(0o644)
        sync_file(path)
        record = FileRecord(file_sha256(path), path.stat().st_size)
    kept = tuple((rows, _DTYPES[str(value.dtype)]) for rows, value in held.values())
    return PartRecord(part, record, kept)


def commit(
    staging: Path,
    final: Path,
    info: CheckpointInfo,
    parts: Sequence[PartRecord],
    files: Mapping[str, bytes],
) -> Path:
    """Make the parts in the staging folder the checkpoint `final`, all at once; return `final`.

    `files` are further ones by name: `source_vocabulary.json`, `target_vocabulary.json` and
    `config.yaml`. The manifest is written last. An earlier checkpoint of the same run and step is
    replaced: for an instant neither is there, and a crash just then falls back to the one before.
    Raises CheckpointError when a part is missing or not whole, when the pieces are not all
    parameters once, when a newer attempt has committed, or when the disk fails.
    """
    _check_fence(final.parent, info)
    _check_replaced(final, info)
    _check_parts(staging, parts, {*files, MANIFEST_NAME})
    tensors = _index(info, parts)
    records = {part.name: part.file for part in parts}
    with _explained(final):
        for name, data in files.items():
            write_durably(staging / name, data)
            records[name] = FileRecord(sha256(data).hexdigest(), len(data))
        write_durably(staging / MANIFEST_NAME, Manifest(info, records, tensors).to_bytes())
        publish_folder(staging, final)
    return final


def prune(directory: Path, keep: int) -> list[Path]:
    """Delete all but the newest `keep` checkpoints; return the deleted ones' paths.

    Staging folders that a crash has left go too, up to the newest checkpoint's step.
    """
    assert keep >= 1
    checkpoints = committed(directory)
    with _explained(directory):
        for path in checkpoints[keep:]:
            remove_folder(path)
        for path in _abandoned(directory, checkpoints):
            shutil.rmtree(path)
    return checkpoints[keep:]


def _abandoned(directory: Path, checkpoints: Sequence[Path]) -> Iterator[Path]:
    newest = int(checkpoints[0].name.removeprefix("step-")) if checkpoints else -1
    for path in sorted(directory.glob(".step-*.tmp")):
        match = _HIDDEN.match(path.name)
        if match and int(match[1]) <= newest:
            yield path


def _check_fence(directory: Path, info: CheckpointInfo) -> None:
    """Refuse when a later life of the same run has committed already."""
    for path in committed(directory) if info.run_id is not None else ():
        other = _readable_info(path)
        if other and other.run_id == info.run_id and other.attempt > info.attempt:
            raise CheckpointError(
                f"attempt {info.attempt} of run {info.run_id} may not commit step {info.step}: "
                f"attempt {other.attempt} has taken over and committed {path}; end this process"
            )


def _check_replaced(final: Path, info: CheckpointInfo) -> None:
    other = _readable_info(final) if final.exists() else None
    if other and other.run_id != info.run_id:
        raise CheckpointError(
            f"{final} is there already, from another run; set checkpoint.directory to another "
            "folder, or remove it"
        )


def _readable_info(path: Path) -> CheckpointInfo | None:
    """Return a checkpoint's info; None if its manifest is damaged, which must not stop a run."""
    try:
        return read_manifest(path).info
    except CheckpointError:
        return None


def _check_parts(staging: Path, parts: Sequence[PartRecord], others: set[str]) -> None:
    for part in parts:
        path = staging / part.name
        size = path.stat().st_size if path.is_file() else None
        if size != part.file.bytes:
            found = "is not there" if size is None else f"has {size} bytes"
            raise CheckpointError(
                f"{path} {found} and its rank wrote {part.file.bytes} bytes; all ranks must "
                "reach checkpoint.directory, so put it on a filesystem that they share"
            )
    # A commit that failed may have left the other files; they are written again.
    listed = others | {part.name for part in parts}
    if unlisted := sorted(path.name for path in staging.iterdir() if path.name not in listed):
        raise CheckpointError(f"{staging / unlisted[0]} was written by no rank of this step")


def _index(info: CheckpointInfo, parts: Sequence[PartRecord]) -> dict[str, TensorRecord]:
    pieces: dict[str, list[Piece]] = {}
    kinds: dict[str, set[tuple[tuple[int, ...], Dtype]]] = {}
    for part in parts:
        for rows, dtype in part.pieces:
            piece = Piece(part.name, rows.key, rows.start, rows.stop)
            pieces.setdefault(rows.name, []).append(piece)
            kinds.setdefault(rows.name, set()).add((rows.shape, dtype))
    tensors: dict[str, TensorRecord] = {}
    for name, found in kinds.items():
        if len(found) > 1:
            raise CheckpointError(f"the parts disagree on shape or format of {name}: {found}")
        [(shape, dtype)] = found
        ordered = tuple(sorted(pieces[name], key=lambda piece: (piece.start, piece.stop)))
        tensors[name] = TensorRecord(shape, dtype, ordered)
    if problem := coverage_problem(info.model, tensors):
        raise CheckpointError(f"step {info.step} makes no whole checkpoint: {problem}")
    return tensors


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the filesystem refuses into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(
            f"{path} cannot be written: {reason}; free space or set checkpoint.directory to "
            "another folder. Checkpoints committed before are intact"
        ) from error
