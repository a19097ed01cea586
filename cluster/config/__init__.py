"""The configuration of a run: its sections, its file, and everything that can be wrong with it."""

from cluster.config.corpus import CorpusConfig, CorpusFiles, VocabularyConfig
from cluster.config.file import ConfigError
from cluster.config.root import Config
from cluster.config.sections import (
    CheckpointConfig,
    ClusterConfig,
    EvaluationConfig,
    ModelSection,
    PipelineConfig,
    TrackingConfig,
    TrainingConfig,
)

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "CorpusConfig",
    "CorpusFiles",
    "EvaluationConfig",
    "ModelSection",
    "PipelineConfig",
    "TrackingConfig",
    "TrainingConfig",
    "VocabularyConfig",
]
