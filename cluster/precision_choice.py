"""Which precision `auto` stands for, decided once and before anything is planned with it."""

from pathlib import Path

from cluster.checkpoint_store import AUTO as NEWEST
from cluster.config import Config
from model.checkpoint import Checkpoint, latest
from model.processor import AUTO, PrecisionName, automatic_precision
from pipeline.costs.file import load_costs


def precision_of(config: Config) -> PrecisionName:
    """Return the configured precision; for `auto` the one that is fast on the configured device.

    The machine of the caller decides for all ranks, since they must agree.
    """
    precision = config.training.precision
    if precision != "auto":
        return precision
    device = config.cluster.device
    return "float32" if device == "emulated" else automatic_precision(device)


def with_precision(config: Config, precision: str | None = None) -> Config:
    """Return the configuration with `auto` replaced, by `precision` if that is given."""
    if config.training.precision != AUTO:
        return config
    fields = config.to_dict()
    fields["training"]["precision"] = precision or precision_of(config)
    return Config.from_dict(fields)


def for_training(config: Config) -> Config:
    """Return the configuration with `auto` replaced.

    A resumed run keeps the precision of its checkpoint, and one that is planned from measured costs
    has theirs. Raises CheckpointError when there is no checkpoint where one was named, or
    CostsError.
    """
    if config.training.precision != AUTO:
        return config
    resumed = _resumed(config)
    if resumed is not None:
        return with_precision(config, Checkpoint.open(resumed, verify=False).info.precision)
    costs = config.pipeline.costs
    return with_precision(config, None if costs is None else load_costs(costs).precision)


def _resumed(config: Config) -> Path | None:
    resume = config.checkpoint.resume
    if resume == NEWEST:
        return latest(config.checkpoint.directory.absolute())
    return None if resume is None else Path(resume)
