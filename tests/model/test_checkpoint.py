"""Checkpoints: any cut in, any cut out; and every kind of damage refused with one clear line."""

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.byte_vocabulary import ByteVocabulary
from model.checkpoint import Checkpoint, CheckpointError, CheckpointInfo, Cursor
from model.checkpoint_manifest import Manifest
from model.checkpoint_writer import PartRecord, commit, part_name, prepare_staging, write_part
from model.parameter import ParameterRows
from model.precision import Precision
from model.seq2seq import ModelConfig, Seq2Seq
from model.translator import load_model
from model.vocabulary import EOS_ID
from model.word_vocabulary import WordVocabulary
from tests.model.decoder_oracle import decode_step

MODEL = ModelConfig(7, 258, num_layers=2, hidden_size=3, embedding_size=4, peepholes=True)
INFO = CheckpointInfo(
    step=12,
    cursor=Cursor(1, 5),
    model=MODEL,
    reverse_source=True,
    precision="float32",
    seed=3,
    corpus_fingerprint="f" * 64,
    num_pairs=1536,
    num_words=40_000,
    run_id="run",
    attempt=1,
)
SOURCE_VOCABULARY = WordVocabulary(["a", "b", "c", "d", "e"])
FILES = {
    "source_vocabulary.json": SOURCE_VOCABULARY.to_bytes(),
    "target_vocabulary.json": ByteVocabulary().to_bytes(),
    "config.yaml": b"name: test\n",
}
Pieces = list[tuple[ParameterRows, Tensor]]


def whole(model: ModelConfig = MODEL, seed: int = 3, precision: str = "float32") -> Pieces:
    parameters = Seq2Seq(model, Precision(precision), seed=seed).parameters().values()
    return [(parameter.rows, parameter.value) for parameter in parameters]


def cut(piece: tuple[ParameterRows, Tensor], cuts: Sequence[int]) -> Pieces:
    rows, value = piece
    bounds = sorted({0, rows.stop, *(c for c in cuts if c < rows.stop)})
    return [
        (ParameterRows(rows.name, rows.shape, start, stop), value[start:stop])
        for start, stop in pairwise(bounds)
    ]


def save(directory: Path, parts: Sequence[Pieces], info: CheckpointInfo = INFO) -> Path:
    staging = prepare_staging(directory, info.step, info.attempt)
    records: list[PartRecord] = []
    for rank, pieces in enumerate(parts):
        records.append(write_part(staging, part_name(rank, len(parts)), pieces))
    return commit(staging, directory / f"step-{info.step:08d}", info, records, FILES)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    pieces = whole()
    return save(tmp_path, [pieces[::2], pieces[1::2]])


def test_everything_comes_back(saved: Path) -> None:
    checkpoint = Checkpoint.open(saved)
    assert checkpoint.info == INFO
    tensors = checkpoint.tensors()
    assert list(tensors) == list(MODEL.parameter_shapes())
    for rows, value in whole():
        assert torch.equal(tensors[rows.name], value)
    assert checkpoint.vocabulary("source").encode("e a") == [6, 2]
    assert checkpoint.vocabulary("target").to_bytes() == ByteVocabulary().to_bytes()
    assert checkpoint.file("config.yaml") == b"name: test\n"
    assert {path.name for path in saved.iterdir()} == {
        *FILES,
        "manifest.json",
        "part-00000-of-00002.safetensors",
        "part-00001-of-00002.safetensors",
    }


@settings(max_examples=25, deadline=None)
@given(
    written=st.lists(st.integers(1, 257), max_size=6),
    read=st.lists(st.integers(1, 257), max_size=6),
    ranks=st.lists(st.integers(0, 4), min_size=1, max_size=30),
    precision=st.sampled_from(["float32", "float64"]),
)
def test_rows_written_in_one_cut_are_read_in_any_other(
    written: list[int], read: list[int], ranks: list[int], precision: str
) -> None:
    pieces = whole(precision=precision)
    parts: list[Pieces] = [[] for _ in range(5)]
    for index, piece in enumerate(p for one in pieces for p in cut(one, written)):
        parts[ranks[index % len(ranks)]].append(piece)
    with TemporaryDirectory() as directory:
        checkpoint = Checkpoint.open(save(Path(directory), parts))
        for rows, value in (p for one in pieces for p in cut(one, read)):
            found = checkpoint.read_rows(rows)
            assert found.dtype == value.dtype
            assert torch.equal(found, value)


def test_a_folder_of_checkpoints_opens_as_its_newest(tmp_path: Path) -> None:
    for step in (5, 100_000_000, 12):
        save(tmp_path, [whole()], replace(INFO, step=step))
    assert Checkpoint.open(tmp_path).info.step == 100_000_000


def test_a_bfloat16_model_saves_and_loads_its_float32_master_weights(tmp_path: Path) -> None:
    pieces = whole(precision="bfloat16")
    checkpoint = Checkpoint.open(save(tmp_path, [pieces], replace(INFO, precision="bfloat16")))
    model = load_model(checkpoint)
    for rows, value in pieces:
        parameter = model.parameters()[rows.name]
        assert torch.equal(parameter.value, value)
        assert torch.equal(parameter.compute, value.to(model.precision.compute))


def test_torch_modules_loaded_from_a_checkpoint_give_the_models_probabilities(
    tmp_path: Path,
) -> None:
    config = ModelConfig(9, 11, num_layers=3, hidden_size=6, embedding_size=5, init_scale=0.5)
    pieces = whole(config, precision="float64")
    saved = save(tmp_path, [pieces], replace(INFO, model=config, precision="float64"))
    checkpoint = Checkpoint.open(saved)
    tensors = checkpoint.tensors()

    def torch_lstm(network: str) -> torch.nn.LSTM:
        lstm = torch.nn.LSTM(5, 6, num_layers=3, dtype=torch.float64)
        state = {f"bias_hh_l{layer}": torch.zeros(24, dtype=torch.float64) for layer in range(3)}
        for layer in range(3):
            state[f"weight_ih_l{layer}"] = tensors[f"{network}.{layer}.weight_ih"]
            state[f"weight_hh_l{layer}"] = tensors[f"{network}.{layer}.weight_hh"]
            state[f"bias_ih_l{layer}"] = tensors[f"{network}.{layer}.bias"]
        lstm.load_state_dict(state)
        return lstm

    linear = torch.nn.Linear(6, 11, dtype=torch.float64)
    linear.load_state_dict({"weight": tensors["softmax.weight"], "bias": tensors["softmax.bias"]})
    source = torch.tensor([[3, 8, 2, EOS_ID]])
    with torch.no_grad():
        _, carry = torch_lstm("encoder")(tensors["source_embedding.weight"][source.t()])
        outputs, _ = torch_lstm("decoder")(
            tensors["target_embedding.weight"][torch.tensor([[EOS_ID], [7]])], carry
        )
        expected = torch.log_softmax(linear(outputs[1]), dim=1)

    model = load_model(checkpoint)
    state = model.encode(source, torch.tensor([4]))
    _, state = decode_step(model, torch.tensor([EOS_ID]), state)
    found, _ = decode_step(model, torch.tensor([7]), state)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not found.requires_grad


# --- damage ------------------------------------------------------------------------------------


def refused(path: Path, verify: bool = True) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path, verify)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def edit_manifest(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change the manifest and give it the right checksum again, as an attacker would."""
    from model.checkpoint_manifest import _checksum

    document = json.loads((path / "manifest.json").read_text())
    del document["sha256"]
    change(document)
    document["sha256"] = _checksum(document)
    (path / "manifest.json").write_text(json.dumps(document))


def rewrite_part(saved: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a part so that the manifest's checksum and size are right again."""
    path = saved / part_name(0, 2)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    list_again(saved, path)


def list_again(saved: Path, path: Path) -> None:
    from model.durable_files import file_sha256

    record = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    edit_manifest(saved, lambda document: document["files"].update({path.name: record}))  # type: ignore[attr-defined]


def test_any_flipped_bit_in_any_file_is_found(saved: Path) -> None:
    for path in sorted(saved.iterdir()):
        original = path.read_bytes()
        for place in range(0, len(original), max(1, len(original) // 40)):
            damaged = bytearray(original)
            damaged[place] ^= 1 << (place % 8)
            path.write_bytes(damaged)
            assert path.name in refused(saved)
        path.write_bytes(original)
    Checkpoint.open(saved)


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_or_missing_file_is_named(saved: Path, verify: bool) -> None:
    for path in sorted(saved.iterdir()):
        original = path.read_bytes()
        path.write_bytes(original[: len(original) // 2])
        assert path.name in refused(saved, verify)
        path.unlink()
        assert path.name in refused(saved, verify) or path.name == "manifest.json"
        path.write_bytes(original)


def test_a_part_of_another_step_is_found(saved: Path, tmp_path: Path) -> None:
    pieces = whole(seed=4)
    other = save(tmp_path / "other", [pieces[::2], pieces[1::2]], replace(INFO, step=13))
    shutil.copy(other / part_name(0, 2), saved / part_name(0, 2))
    assert "SHA-256" in refused(saved)


def test_an_unknown_version_is_refused(saved: Path) -> None:
    edit_manifest(saved, lambda document: document.update(version=2))
    assert "version 2" in refused(saved)


def test_extra_tensors_are_refused(saved: Path) -> None:
    rewrite_part(saved, lambda tensors: tensors.update(surprise=torch.zeros(1)))
    assert "surprise" in refused(saved)


def test_a_tensor_of_the_wrong_shape_is_refused(saved: Path) -> None:
    key = "source_embedding.weight"
    rewrite_part(saved, lambda tensors: tensors.update({key: torch.zeros(6, 4)}))
    assert key in refused(saved)


def test_a_tensor_of_the_wrong_format_is_refused(saved: Path) -> None:
    key = "source_embedding.weight"
    rewrite_part(saved, lambda tensors: tensors.update({key: tensors[key].double()}))
    assert "F64" in refused(saved)


def test_a_missing_tensor_is_refused(saved: Path) -> None:
    rewrite_part(saved, lambda tensors: tensors.pop("source_embedding.weight"))
    assert "source_embedding.weight" in refused(saved)


def test_a_name_that_stands_twice_in_a_header_is_refused(saved: Path) -> None:
    path = saved / part_name(0, 2)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].rstrip()
    entry = (
        b'"source_embedding.weight":'
        + json.dumps(json.loads(header)["source_embedding.weight"]).encode()
    )
    header = header[:-1] + b"," + entry + b"}"
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    list_again(saved, path)
    assert "twice" in refused(saved)


def test_a_huge_header_is_refused_before_it_is_read(saved: Path) -> None:
    path = saved / part_name(0, 2)
    path.write_bytes(struct.pack("<Q", 1 << 26) + b" " * (1 << 21))
    list_again(saved, path)
    assert "header" in refused(saved)


def test_a_manifest_cannot_point_outside_its_folder(saved: Path) -> None:
    edit_manifest(
        saved,
        lambda document: document["files"].update(  # type: ignore[attr-defined]
            {"../secret": {"sha256": "0", "bytes": 1}}
        ),
    )
    assert "files" in refused(saved)


def test_pieces_that_leave_rows_out_are_refused(saved: Path) -> None:
    def shorten(document: dict[str, object]) -> None:
        document["tensors"]["softmax.bias"]["pieces"][0]["stop"] = 200  # type: ignore[index]

    edit_manifest(saved, shorten)
    assert "softmax.bias" in refused(saved)


def test_an_absurd_number_of_layers_is_refused_at_once(saved: Path) -> None:
    def grow(document: dict[str, object]) -> None:
        document["info"]["model"]["num_layers"] = 10**12  # type: ignore[index]

    edit_manifest(saved, grow)
    assert "layers" in refused(saved)


@pytest.mark.parametrize("text", ["", "[1]", "{}", "[" * 100_000, "\x00", '{"format": "other"}'])
def test_a_manifest_that_is_none_is_refused(saved: Path, text: str) -> None:
    (saved / "manifest.json").write_text(text)
    refused(saved)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.zeros(2)}, path)
    assert "pickle" in refused(path)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    assert "not there" in refused(tmp_path / "nothing")
    assert "no checkpoint" in refused(tmp_path)
    (tmp_path / "file").write_text("text")
    assert "is a file" in refused(tmp_path / "file")


def test_rows_for_a_model_of_other_sizes_are_refused(saved: Path) -> None:
    checkpoint = Checkpoint.open(saved)
    with pytest.raises(CheckpointError, match="has shape"):
        checkpoint.read_rows(ParameterRows("softmax.bias", (300,), 0, 10))
    with pytest.raises(CheckpointError, match="rows 0 to 258"):
        checkpoint.read("softmax.bias", 250, 300)
    with pytest.raises(CheckpointError, match=r"encoder\.9"):
        checkpoint.read("encoder.9.bias")


def test_the_manifest_is_the_same_for_the_same_contents(saved: Path) -> None:
    data = (saved / "manifest.json").read_bytes()
    assert Manifest.from_bytes(data).to_bytes() == data
