"""What MLflow is told of a run beside its settings: what follows from them, and a line in words."""

import os

from cluster.config import Config
from cluster.corpus.prepared import PreparedCorpus
from cluster.layout import layout_words
from pipeline.plan import Plan


def run_facts(plan: Plan, corpus: PreparedCorpus, steps_per_epoch: int) -> dict[str, str | int]:
    """Return what follows from configuration and corpus, or decides the last bits."""
    model = plan.model
    return {
        "num_parameters": model.num_parameters(),
        "num_ranks": plan.num_ranks,
        "num_replicas": plan.num_replicas,
        "source_vocabulary_size": model.source_vocabulary_size,
        "target_vocabulary_size": model.target_vocabulary_size,
        "steps_per_epoch": steps_per_epoch,
        "corpus_fingerprint": corpus.fingerprint,
        "cpu_capability": _cpu_capability(),
    }


def describe(config: Config, plan: Plan) -> str:
    """Say in a line what is trained, and how, for whoever looks through many runs."""
    model = plan.model
    emulated = "emulated, nothing is learnt: " if config.cluster.device == "emulated" else ""
    return (
        f"{emulated}{model.num_layers} layers of {model.hidden_size:,} cells, "
        f"{model.num_parameters():,} weights, on {layout_words(plan)}; "
        f"corpus {config.corpus.directory}"
    )


def _cpu_capability() -> str:
    import torch

    return os.environ.get("ATEN_CPU_CAPABILITY") or torch.backends.cpu.get_cpu_capability()
