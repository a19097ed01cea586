"""A checkpoint of an untrained network over bytes: what it says is noise, but it says it."""

from pathlib import Path

from model.byte_vocabulary import ByteVocabulary
from model.checkpoint_manifest import CheckpointInfo
from model.checkpoint_writer import commit, part_name, prepare_staging, write_part
from model.data_order import Cursor
from model.network import ModelConfig
from model.seq2seq import Seq2Seq


def noise_checkpoint(directory: Path, hidden_size: int = 4, seed: int = 1) -> Path:
    """Write the checkpoint into a folder of checkpoints; return its own folder."""
    config = ModelConfig(258, 258, 1, hidden_size, hidden_size, init_scale=0.5)
    parameters = Seq2Seq(config, seed=seed).parameters().values()
    staging = prepare_staging(directory, 1, 0)
    part = write_part(staging, part_name(0, 1), [(p.rows, p.value) for p in parameters])
    info = CheckpointInfo(
        step=1,
        cursor=Cursor(0, 1),
        model=config,
        reverse_source=True,
        precision="float32",
        seed=seed,
        corpus_fingerprint="0" * 64,
    )
    vocabulary = ByteVocabulary().to_bytes()
    files = {"source_vocabulary.json": vocabulary, "target_vocabulary.json": vocabulary}
    return commit(staging, directory / "step-00000001", info, [part], files)
