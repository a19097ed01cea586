"""The commit: all or nothing at every filesystem call, and no commit of what is not whole."""

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model import checkpoint_writer
from model.checkpoint import Checkpoint, CheckpointError, CheckpointInfo, Cursor, committed, latest
from model.checkpoint_writer import commit, part_name, prepare_staging, prune, write_part
from model.durable_files import write_durably
from model.parameter import ParameterRows
from model.seq2seq import ModelConfig

MODEL = ModelConfig(5, 6, num_layers=1, hidden_size=2, embedding_size=2)
INFO = CheckpointInfo(
    step=1,
    cursor=Cursor(0, 1),
    model=MODEL,
    reverse_source=True,
    precision="float32",
    seed=1,
    corpus_fingerprint="",
    run_id="run",
)
Pieces = list[tuple[ParameterRows, torch.Tensor]]


class Crash(BaseException):
    """The process dies here: no handler of ours runs on it."""


def pieces(value: float) -> Pieces:
    return [
        (ParameterRows(name, shape, 0, shape[0]), torch.full(shape, value))
        for name, shape in MODEL.parameter_shapes().items()
    ]


def save(directory: Path, step: int, **changes: Any) -> Path:
    info = replace(INFO, step=step, **changes)
    staging = prepare_staging(directory, step, info.attempt)
    held = pieces(float(step + 100 * info.attempt))
    parts = [write_part(staging, part_name(i, 2), held[i::2]) for i in range(2)]
    return commit(staging, directory / f"step-{step:08d}", info, parts, {"config.yaml": b"x: 1"})


def value(path: Path) -> float:
    return float(Checkpoint.open(path).read("softmax.bias")[0])


OS_CALLS = ("fsync", "rename", "mkdir", "unlink", "rmdir")


def fail_at(
    monkeypatch: pytest.MonkeyPatch,
    call: int,
    error: BaseException,
    os_calls: Sequence[str] = OS_CALLS,
) -> list[str]:
    """Let the given filesystem call of the writer fail; return the list of the calls made."""
    calls: list[str] = []

    def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == call + 1:
                raise error
            return function(*args, **options)

        return wrapper

    for name in os_calls:
        monkeypatch.setattr(os, name, guarded(name, getattr(os, name)))
    monkeypatch.setattr(Path, "rename", guarded("rename", Path.rename))
    for name, function in (("save_file", save_file), ("write_durably", write_durably)):
        monkeypatch.setattr(checkpoint_writer, name, guarded(name, function))
    return calls


def test_a_crash_at_any_filesystem_call_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[int] = []
    for call in range(100):
        directory = tmp_path / str(call)
        save(directory, 1)
        with monkeypatch.context() as patch:
            calls = fail_at(patch, call, Crash())
            try:
                save(directory, 2)
                finished = len(calls) <= call
            except Crash:
                finished = False
        newest = latest(directory)
        assert newest is not None
        info = Checkpoint.open(newest).info
        assert value(newest) == info.step
        outcomes.append(info.step)
        if finished:
            break
        # What the crash left behind does not keep the next attempt from committing.
        assert value(save(directory, 2, attempt=1)) == 102.0
    assert finished
    assert outcomes[0] == 1
    assert outcomes == sorted(outcomes)
    assert len(outcomes) > 10


def test_a_crash_while_a_step_is_replaced_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in range(100):
        directory = tmp_path / str(call)
        save(directory, 1)
        save(directory, 2)
        with monkeypatch.context() as patch:
            calls = fail_at(patch, call, Crash())
            try:
                save(directory, 2, attempt=1)
                finished = len(calls) <= call
            except Crash:
                finished = False
        newest = latest(directory)
        assert newest is not None
        assert value(newest) in (1.0, 2.0, 102.0)
        if finished:
            assert value(newest) == 102.0
            break
    assert finished


def test_a_crash_while_pruning_leaves_whole_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in range(100):
        directory = tmp_path / str(call)
        for step in (1, 2, 3):
            save(directory, step)
        with monkeypatch.context() as patch:
            calls = fail_at(patch, call, Crash())
            try:
                prune(directory, 1)
                finished = len(calls) <= call
            except Crash:
                finished = False
        for path in committed(directory):
            Checkpoint.open(path)
        assert latest(directory) == directory / "step-00000003"
        if finished:
            break
        prune(directory, 1)
        assert [path.name for path in directory.iterdir()] == ["step-00000003"]
    assert finished


def test_a_full_disk_is_one_clear_line_and_the_old_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for call in range(8):
        with monkeypatch.context() as patch:
            fail_at(patch, call, full, ["fsync"])
            with pytest.raises(CheckpointError, match="No space left on device") as caught:
                save(tmp_path, 2)
        assert "\n" not in str(caught.value)
        assert latest(tmp_path) == tmp_path / "step-00000001"
    assert value(save(tmp_path, 2)) == 2.0


def test_a_commit_that_failed_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = prepare_staging(tmp_path, 1, 0)
    parts = [write_part(staging, part_name(0, 1), pieces(1.0))]
    with monkeypatch.context() as patch:
        fail_at(patch, 4, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(CheckpointError, match="Input/output error"):
            commit(staging, tmp_path / "step-00000001", INFO, parts, {"config.yaml": b""})
    path = commit(staging, tmp_path / "step-00000001", INFO, parts, {"config.yaml": b""})
    assert value(path) == 1.0


def parts_with(staging: Path, held: Pieces) -> list[checkpoint_writer.PartRecord]:
    return [write_part(staging, part_name(0, 1), held)]


def refused(tmp_path: Path, held: Pieces) -> str:
    staging = prepare_staging(tmp_path, 1, 0)
    with pytest.raises(CheckpointError) as caught:
        commit(staging, tmp_path / "step-00000001", INFO, parts_with(staging, held), {})
    assert latest(tmp_path) is None
    return str(caught.value)


def test_pieces_that_are_not_all_parameters_once_are_refused(tmp_path: Path) -> None:
    held = pieces(1.0)
    bias = next(rows for rows, _ in held if rows.name == "softmax.bias")
    others = [piece for piece in held if piece[0] != bias]
    assert "softmax.bias is missing" in refused(tmp_path, others)

    def bias_rows(*bounds: tuple[int, int]) -> Pieces:
        return [
            (ParameterRows(bias.name, bias.shape, start, stop), torch.zeros(stop - start))
            for start, stop in bounds
        ]

    assert "rows 2 to 3" in refused(tmp_path, others + bias_rows((0, 2), (3, 6)))
    assert "in two parts" in refused(tmp_path, others + bias_rows((0, 4), (3, 6)))
    assert "in two parts" in refused(tmp_path, others + bias_rows((0, 6), (0, 3)))
    assert "end at row 5" in refused(tmp_path, others + bias_rows((0, 5)))
    extra = ParameterRows("decoder.7.bias", (1,), 0, 1)
    assert "decoder.7.bias" in refused(tmp_path, [*held, (extra, torch.zeros(1))])
    double = [(rows, v.double() if rows.start else v) for rows, v in bias_rows((0, 2), (2, 6))]
    assert "disagree" in refused(tmp_path, others + double)


def test_rows_cut_to_nothing_are_not_written(tmp_path: Path) -> None:
    staging = prepare_staging(tmp_path, 1, 0)
    empty = ParameterRows("softmax.bias", (6,), 6, 6)
    record = write_part(staging, part_name(0, 1), [*pieces(1.0), (empty, torch.zeros(0))])
    path = commit(staging, tmp_path / "step-00000001", INFO, [record], {})
    assert value(path) == 1.0


def test_a_part_that_the_committer_cannot_see_is_refused(tmp_path: Path) -> None:
    staging = prepare_staging(tmp_path, 1, 0)
    parts = parts_with(staging, pieces(1.0))
    (staging / parts[0].name).unlink()
    with pytest.raises(CheckpointError, match="share"):
        commit(staging, tmp_path / "step-00000001", INFO, parts, {})


def test_a_part_of_nobody_is_refused(tmp_path: Path) -> None:
    staging = prepare_staging(tmp_path, 1, 0)
    parts = parts_with(staging, pieces(1.0))
    write_part(staging, part_name(7, 8), pieces(2.0))
    with pytest.raises(CheckpointError, match="part-00007-of-00008"):
        commit(staging, tmp_path / "step-00000001", INFO, parts, {})


def test_an_attempt_that_was_given_up_cannot_commit(tmp_path: Path) -> None:
    save(tmp_path, 1, attempt=2)
    with pytest.raises(CheckpointError, match="attempt 2 has taken over"):
        save(tmp_path, 2, attempt=1)
    assert latest(tmp_path) == tmp_path / "step-00000001"
    assert value(save(tmp_path, 2, attempt=2)) == 202.0


def test_another_runs_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="another run"):
        save(tmp_path, 1, run_id="other", attempt=5)
    assert value(tmp_path / "step-00000001") == 1.0


def test_a_damaged_checkpoint_does_not_stop_the_run_that_replaces_it(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text("damaged")
    assert value(save(tmp_path, 2)) == 2.0
    assert value(save(tmp_path, 1, attempt=1)) == 101.0


def test_prune_keeps_the_newest_and_clears_what_crashes_left(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    prepare_staging(tmp_path, 3, 0)
    unfinished = prepare_staging(tmp_path, 9, 0)
    (tmp_path / "notes").mkdir()
    assert [path.name for path in prune(tmp_path, 2)] == ["step-00000002", "step-00000001"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "step-00000003",
        "step-00000004",
        unfinished.name,
        "notes",
    }


def test_nothing_is_latest_where_nothing_is_committed(tmp_path: Path) -> None:
    assert latest(tmp_path / "missing") is None
    prepare_staging(tmp_path, 1, 0)
    (tmp_path / "step-00000007").mkdir()
    assert latest(tmp_path) is None
