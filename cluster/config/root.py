"""The configuration of one run: one YAML file, checked as a whole.

The sections stand in `cluster.config.corpus` and `cluster.config.sections`; this is the root that
holds them, refuses layouts that cannot work, and derives what follows from them.
`cluster.config.file` reads the file and words what is wrong with it. Paths are relative to the
folder in which the command runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from cluster.config.corpus import CorpusConfig
from cluster.config.file import load_validated, validate
from cluster.config.placement_file import read_placement_file
from cluster.config.sections import (
    PLACEMENT_NAMES,
    CheckpointConfig,
    ClusterConfig,
    EvaluationConfig,
    ModelSection,
    PipelineConfig,
    Section,
    TrackingConfig,
    TrainingConfig,
)
from cluster.config.strict_yaml import dump_yaml

if TYPE_CHECKING:
    from model.seq2seq import ModelConfig

Scalar = str | int | float | bool | None
_LEAST_RANKS = {"paper": 2, "separate": 2, "split": 2}


class Config(Section):
    """Everything about one run; built by `Config.load` from a YAML file and overrides."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")] = Field(
        description="Name of the run: letters, digits, dot, dash and underscore"
    )
    seed: int = Field(
        default=1, ge=0, lt=2**63, description="Start of everything that is drawn at random"
    )
    corpus: CorpusConfig = Field(description="The text")
    model: ModelSection = Field(default_factory=ModelSection, description="The network")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="The optimiser")
    pipeline: PipelineConfig = Field(default_factory=PipelineConfig, description="The layout")
    cluster: ClusterConfig = Field(default_factory=ClusterConfig, description="The machines")
    checkpoint: CheckpointConfig = Field(description="The kept states")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="Scoring")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="MLflow")

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, apply `section.key=value` overrides in their order, and validate.

        Raises ConfigError, which lists every problem, if anything is wrong with it.
        """
        return load_validated(cls, Path(path), overrides)

    @model_validator(mode="after")
    def _layout_is_possible(self) -> Self:
        problems = list(self._layout_problems())
        if problems:
            raise ValueError(*problems)
        return self

    def _layout_problems(self) -> Iterator[str]:
        if self.training.schedule is None:
            yield from self._placement_problems()
        if self.pipeline.placement == "auto" and self.training.schedule is None:
            return  # the planner chooses replicas and cuts
        yield from self._batch_problems()
        num_positions = self.corpus.max_length + 1
        if self.pipeline.time_chunks > num_positions:
            yield (
                f"pipeline.time_chunks={self.pipeline.time_chunks} is more than the {num_positions}"
                f" positions of the longest sentence (corpus.max_length={self.corpus.max_length} "
                "and </s>); lower it"
            )

    def _batch_problems(self) -> Iterator[str]:
        replicas, microbatches = self.pipeline.replicas, self.pipeline.microbatches
        num_sentences = self.training.batch_size
        if replicas > num_sentences:
            yield (
                f"pipeline.replicas={replicas} is more than the training.batch_size="
                f"{num_sentences} sentences of a batch, which the replicas share; lower it or "
                "raise training.batch_size"
            )
            return
        share = -(-num_sentences // replicas)
        if microbatches > share:
            batch = f"training.batch_size={num_sentences}"
            what = f"the {batch} sentences of a batch"
            if replicas > 1:
                what = (
                    f"the {share} sentences of a replica's share of {batch} "
                    f"(pipeline.replicas={replicas})"
                )
            yield (
                f"pipeline.microbatches={microbatches} is more than {what}; lower it or raise "
                "training.batch_size"
            )

    def _placement_problems(self) -> Iterator[str]:
        pipeline = self.pipeline
        if pipeline.placement in ("paper", "uneven"):
            yield from self._layer_rank_problems()
            yield from self._softmax_rank_problems()
        least = _LEAST_RANKS.get(pipeline.placement, 1)
        if pipeline.ranks is not None and pipeline.ranks < least:
            yield (
                f"pipeline.ranks={pipeline.ranks} is too few for pipeline.placement="
                f"{pipeline.placement}, which needs {least} or more; raise it, or use single"
            )

    def _softmax_rank_problems(self) -> Iterator[str]:
        softmax_ranks, num_words = self.pipeline.softmax_ranks, self.corpus.target_vocabulary.size
        if self.pipeline.ranks is None and softmax_ranks > num_words:
            yield (
                f"pipeline.softmax_ranks={softmax_ranks} is more than "
                f"corpus.target_vocabulary.size={num_words}; a rank needs at least one word: "
                "lower pipeline.softmax_ranks"
            )

    def _layer_rank_problems(self) -> Iterator[str]:
        pipeline = self.pipeline
        if pipeline.ranks is not None and pipeline.layer_ranks is None:
            return  # the placement cuts the ranks as it is best
        num_layer_ranks = pipeline.layer_ranks or self.model.num_layers
        if num_layer_ranks > self.model.num_layers:
            yield (
                f"pipeline.layer_ranks={num_layer_ranks} is more than "
                f"model.num_layers={self.model.num_layers}; a rank needs at least one layer: "
                "lower pipeline.layer_ranks, or set it to null for one rank a layer"
            )
        most = (pipeline.ranks or num_layer_ranks + 1) - (pipeline.placement == "paper")
        if num_layer_ranks > most:
            yield (
                f"pipeline.layer_ranks={num_layer_ranks} leaves no rank of pipeline.ranks="
                f"{pipeline.ranks} for the words of the softmax; lower it, or set it to null"
            )

    @property
    def num_layer_ranks(self) -> int:
        """Ranks that hold layers, in the layouts of the paper: one if the placement is `single`."""
        if self.pipeline.placement == "single":
            return 1
        return self.pipeline.layer_ranks or self.model.num_layers

    @property
    def num_softmax_ranks(self) -> int:
        """Ranks that hold nothing but a part of the softmax: none if the placement is `single`."""
        return 0 if self.pipeline.placement == "single" else self.pipeline.softmax_ranks

    @property
    def num_ranks(self) -> int:
        """Ranks of one replica, unless the planner shall choose: see `num_workers`.

        Reads the file of the schedule or of the placement, if one is named: raises UserError.
        """
        if self.training.schedule is not None:
            from pipeline.schedules.file import load_schedule  # brings in torch

            return load_schedule(self.training.schedule).placement.num_ranks
        if self.pipeline.placement not in PLACEMENT_NAMES:
            return read_placement_file(Path(self.pipeline.placement)).num_ranks
        if self.pipeline.placement != "single" and self.pipeline.ranks is not None:
            return self.pipeline.ranks
        return self.num_layer_ranks + self.num_softmax_ranks

    @property
    def num_workers(self) -> int:
        """Ranks of all replicas, so also devices; raises UserError as `num_ranks` does."""
        return self.num_ranks * self.pipeline.replicas

    @property
    def num_parameters(self) -> int:
        """Weights of the network without biases, as the paper counts, for full vocabularies."""
        sizes = self.corpus.source_vocabulary.size, self.corpus.target_vocabulary.size
        return self.model_config_for(*sizes).num_parameters()

    def model_config_for(
        self, source_vocabulary_size: int, target_vocabulary_size: int
    ) -> "ModelConfig":
        """Give the network's shape for vocabularies as they were built.

        They can be smaller than configured, when the corpus has fewer different words.
        """
        from model.seq2seq import ModelConfig  # brings in torch, which most commands do not need

        return ModelConfig(
            source_vocabulary_size=source_vocabulary_size,
            target_vocabulary_size=target_vocabulary_size,
            num_layers=self.model.num_layers,
            hidden_size=self.model.hidden_size,
            embedding_size=self.model.embedding_size,
            peepholes=self.model.peepholes,
            init_scale=self.model.init_scale,
        )

    def to_dict(self) -> dict[str, Any]:
        """Give the configuration in JSON's types; `from_dict` reads it back to an equal one."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(
        cls, fields: Mapping[str, Any], *, origin: str = "the stored configuration"
    ) -> Self:
        """Read what `to_dict` gave, for example out of a checkpoint's manifest.

        `origin` says in errors where the fields are from. Raises ConfigError if they are not those
        of a configuration of this version.
        """
        return validate(cls, fields, origin=origin)

    def to_yaml(self) -> str:
        """Give the configuration as a YAML file that `load` reads back to an equal one."""
        return dump_yaml(self.to_dict())

    def flat(self) -> dict[str, Scalar]:
        """Give every setting under its dotted name, lists joined by commas: MLflow's parameters."""
        return dict(_flatten(self.to_dict(), ""))


def _flatten(fields: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Scalar]]:
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", ", ".join(map(str, value))
        else:
            yield f"{prefix}{key}", value
