"""Small models, plans and worker groups for the tests that run real actors."""

from pathlib import Path

from cluster.config.sections import ClusterConfig
from model.checkpoint_folder import checkpoint_name
from model.checkpoint_manifest import CheckpointInfo
from model.checkpoint_writer import commit, part_name, prepare_staging, write_part
from model.data_order import Cursor
from model.network import ModelConfig
from model.precision import Precision
from model.seq2seq import Seq2Seq
from pipeline.placements.named import named_placement
from pipeline.plan import Plan

MODEL = ModelConfig(11, 13, num_layers=4, hidden_size=5, embedding_size=6, init_scale=0.4)
SMALL_SHARE = ClusterConfig(cpus_per_rank=0.1, timeout_s=30.0)


def plan_of(
    placement: str,
    layer_ranks: int = 1,
    softmax_ranks: int = 1,
    *,
    m: int = 1,
    k: int = 1,
    replicas: int = 1,
) -> Plan:
    """Plan the small model in float64 with M microbatches and K time chunks."""
    placed = named_placement(placement, MODEL, layer_ranks=layer_ranks, softmax_ranks=softmax_ranks)
    return Plan(
        MODEL,
        placed,
        num_microbatches=m,
        num_chunks=k,
        precision="float64",
        seed=3,
        num_replicas=replicas,
    )


def oracle() -> Seq2Seq:
    """Build the same model on one device, with the same initial values."""
    return Seq2Seq(MODEL, Precision("float64"), seed=3)


def info_of(step: int = 0) -> CheckpointInfo:
    """Describe a checkpoint of the small model."""
    return CheckpointInfo(
        step=step,
        cursor=Cursor(0, step),
        model=MODEL,
        reverse_source=True,
        precision="float64",
        seed=3,
        corpus_fingerprint="none",
    )


def save(model: Seq2Seq, directory: Path) -> Path:
    """Commit a checkpoint of a whole model as step 0."""
    staging = prepare_staging(directory, 0, 1)
    pieces = [(p.rows, p.value) for p in model.parameters().values()]
    record = write_part(staging, part_name(0, 1), pieces)
    return commit(staging, directory / checkpoint_name(0), info_of(), [record], {})
