"""The settings of network, optimiser, pipeline, machines, checkpoints, evaluation and tracking.

Each section is checked on its own here; what excludes what between sections is in
`cluster.config.root`. Defaults are the values of Sutskever, Vinyals & Le (2014), where the paper
states one.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator


def _path(value: object) -> object:
    if isinstance(value, str) and not (value and value.isprintable()):
        raise ValueError(f"is {value!r}; it must be the path of a folder, `.` for the current one")
    return value


def _threads(value: object) -> object:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if value != "auto" and not (is_number and 1 <= int(str(value)) <= _MOST_THREADS):
        raise ValueError(f"is {value!r}; it must be auto or a whole number from 1 to 1024")
    return value


_MOST_THREADS = 1024
Threads = Annotated[int | Literal["auto"], BeforeValidator(_threads)]
Text = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]*$")]
FolderPath = Annotated[Path, BeforeValidator(_path), Field(strict=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
PositiveFloat = Annotated[float, Field(gt=0)]
PLACEMENT_NAMES = ("single", "paper", "uneven", "separate", "split", "auto")


class Section(BaseModel):
    """What all sections share: no unknown keys, no conversions, no NaN or infinity, no changes."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )


class ModelSection(Section):
    """The network's shape; the vocabularies' sizes come from the corpus."""

    num_layers: int = Field(
        default=4, ge=1, le=1000, description="LSTM layers of the encoder and of the decoder, each"
    )
    hidden_size: int = Field(default=1000, ge=1, le=65_536, description="Cells of a layer")
    embedding_size: int = Field(
        default=1000, ge=1, le=65_536, description="Numbers of a word's embedding"
    )
    peepholes: bool = Field(
        default=False, description="Gates also see the cell state (Graves 2013)"
    )
    init_scale: PositiveFloat = Field(
        default=0.08, description="Parameters start uniform in [-init_scale, init_scale]"
    )
    reverse_source: bool = Field(
        default=True, description="The encoder reads the source sentence from its end"
    )


class TrainingConfig(Section):
    """Plain SGD, its learning rate over time, and how long it goes on."""

    batch_size: int = Field(
        default=128,
        ge=1,
        le=1_000_000,
        description="Sentence pairs of one step; the gradient is divided by this number",
    )
    epochs: PositiveFloat = Field(
        default=7.5, description="Passes over the training pairs, fractions allowed"
    )
    max_steps: Count | None = Field(
        default=None, description="Stop after this many steps if the epochs are not over; or null"
    )
    learning_rate: PositiveFloat = Field(default=0.7, description="Of SGD without momentum")
    halve_after_epochs: Annotated[float, Field(ge=0)] = Field(
        default=5.0, description="Epochs at the full learning rate"
    )
    halve_every_epochs: PositiveFloat = Field(
        default=0.5, description="After those, the learning rate halves each time these pass"
    )
    clip_norm: PositiveFloat | None = Field(
        default=5.0,
        description="Largest 2-norm of the whole gradient; larger ones are scaled down to it; "
        "null: never",
    )
    precision: Literal["auto", "float32", "bfloat16", "float64"] = Field(
        default="auto",
        description="Numbers of the computation; bfloat16 keeps float32 master weights; auto: "
        "bfloat16 where processor or GPU multiply it fast, else float32; a resumed run keeps that "
        "of its checkpoint",
    )
    validate_every_steps: Count | None = Field(
        default=None, description="Steps between validations; null: at each epoch's end"
    )
    log_every_steps: Count = Field(
        default=10, description="Steps over which logged metrics are averaged"
    )
    schedule: FolderPath | None = Field(
        default=None,
        description="Saved schedule file to train with as it stands; it has the placement and the "
        "cuts, so that those under `pipeline` are not looked at; null: pipeline.policy makes one",
    )


class PipelineConfig(Section):
    """How the model is cut over ranks and in which order each rank works."""

    placement: Text = Field(
        default="paper",
        description="single: one rank has it all; paper: layer ranks, which hold encoder and "
        "decoder layer l together, and softmax ranks, which share the target vocabulary; uneven: "
        "the layer ranks take some words too; separate: encoder ranks and decoder ranks; split: "
        "recurrences and projections on different ranks; auto: the planner chooses, policy and "
        "cuts as well; or a file that ends in .yaml, with a rank for every block",
    )
    ranks: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="Ranks of a replica, for every placement but single and a file; null: "
        "layer_ranks and softmax_ranks together; with auto, the planner shares out ranks times "
        "replicas",
    )
    replicas: int = Field(
        default=1,
        ge=1,
        le=10_000,
        description="Copies of the pipeline that share each batch's sentences and sum their "
        "gradients, so that results do not depend on their number; with auto the planner chooses",
    )
    layer_ranks: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Ranks that share the layers (placements paper and uneven); null: one for each "
        "layer, or what is best of `ranks`",
    )
    softmax_ranks: int = Field(
        default=4,
        ge=1,
        le=1000,
        description="Ranks that share the softmax's words and hold no layer (placements paper and "
        "uneven), if `ranks` is null",
    )
    policy: Literal["fill_drain", "wavefront", "1f1b", "deferred_weights", "priority_list"] = Field(
        default="wavefront", description="How each rank's order of operations is chosen"
    )
    costs: FolderPath | None = Field(
        default=None,
        description="File of measured costs, for what depends on them: orders, shares of words, "
        "auto; null: counts of arithmetic at one rate, messages free, but for auto the rate and "
        "the link that are usual for cluster.device are assumed",
    )
    microbatches: int = Field(
        default=1, ge=1, le=10_000, description="Parts into which a batch's sentences are cut"
    )
    time_chunks: int = Field(
        default=1, ge=1, le=10_000, description="Parts into which the positions of a side are cut"
    )
    recompute_logits: bool = Field(
        default=False,
        description="Make the logits of a vocabulary shard twice, rather than keep them for the "
        "gradients: a third more work for the softmax, and no table of the shard's words for "
        "every word of a batch. A rank that holds the whole model never keeps them",
    )
    timeline: bool = Field(
        default=False,
        description="Record when every operation of a few steps ran, and draw it at the run's end; "
        "of several replicas only the first",
    )
    timeline_steps: int = Field(
        default=3, ge=1, le=100, description="Steps that are recorded, after five to warm up"
    )

    @field_validator("placement")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in PLACEMENT_NAMES and not value.endswith((".yaml", ".yml")):
            raise ValueError(
                f"is {value!r}; use one of {', '.join(PLACEMENT_NAMES)}, or the path of a .yaml "
                "file that gives every block a rank"
            )
        return value


class ClusterConfig(Section):
    """The machines: which Ray cluster, and what each rank gets of it."""

    address: Text | None = Field(
        default=None,
        description="Ray cluster: auto, 10.0.0.1:6379, or local to start Ray here; null: "
        "RAY_ADDRESS if that is set, else Ray starts on this machine",
    )
    device: Literal["cpu", "cuda", "emulated"] = Field(
        default="cpu",
        description="What a rank computes on; cuda takes one GPU for each rank, and emulated only "
        "waits as long as the costs say, to measure all else",
    )
    threads_per_rank: Threads = Field(
        default="auto",
        description="CPU threads of a rank, 1 to 1,024; the last bits of results depend on it; "
        "auto: the usable cores of the rank's node, shared out among this run's ranks there",
    )
    pin_cores: bool = Field(
        default=False,
        description="Keep every rank on cores of its own where its node has enough; only for nodes "
        "that no other run shares, which would be given the same cores",
    )
    cpus_per_rank: float = Field(
        default=1.0,
        ge=0.0001,
        le=1024,
        description="Ray's logical CPUs that a rank reserves, fractions of at most four decimals",
    )
    timeout_s: float = Field(
        default=60.0,
        ge=0.1,
        le=1_000_000,
        description="Seconds after which a rank that waits for another gives up",
    )
    shared_memory: bool = Field(
        default=True,
        description="Ranks of one machine hand tensors over in shared memory; false: everything "
        "goes over the network",
    )

    @field_validator("cpus_per_rank")
    @classmethod
    def _is_countable(cls, value: float) -> float:
        if value != round(value, 4):
            raise ValueError(
                f"is {value}; Ray counts CPUs in steps of 0.0001: use {round(value, 4)}"
            )
        return value


class CheckpointConfig(Section):
    """Where and how often the training state is kept."""

    directory: FolderPath = Field(description="Folder of the checkpoints, one subfolder each")
    every_steps: Count | None = Field(
        default=None, description="Steps between checkpoints; null: at each epoch's end"
    )
    keep: int = Field(default=3, ge=1, le=1_000_000, description="Newest checkpoints that are kept")
    resume: Text | None = Field(
        default=None,
        description="Checkpoint folder to go on from; auto: the newest one in `directory`, if "
        "there is one; null: start anew",
    )


class EvaluationConfig(Section):
    """Decoding and scoring of held-out text."""

    beam_size: int = Field(
        default=12, ge=1, le=1000, description="Partial translations kept; 1 is greedy"
    )
    length_penalty: float = Field(
        default=0.0,
        ge=0,
        le=10,
        description="Exponent of the length by which scores are divided; 0 as in the paper",
    )
    max_length: int = Field(
        default=100, ge=1, le=10_000, description="Tokens after which a translation is cut off"
    )
    batch_size: int = Field(
        default=64, ge=1, le=100_000, description="Sentences decoded at the same time"
    )
    num_samples: int = Field(
        default=10, ge=0, le=10_000, description="Translations shown beside their references"
    )


class TrackingConfig(Section):
    """Where MLflow keeps the run."""

    uri: Text = Field(
        default="sqlite:///mlflow.db",
        description="MLflow tracking URI: a local database or a server such as http://host:5000",
    )
    experiment: Text = Field(default="baton", description="Experiment that the run belongs to")
    run_name: Text | None = Field(default=None, description="Name of the run; null: `name`")
