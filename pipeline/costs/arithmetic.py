"""Costs by exact counts of multiply-adds at one rate on every device, without measuring anything.

A position of a sentence takes 4 H D multiply-adds in the input projection of a layer with D inputs,
4 H H in its recurrence, and H V in a vocabulary shard of V words, which is 8M a layer and 80M for
the whole softmax of Sutskever et al. (2014). F, I and W take the same. Embeddings and the loss are
lookups and sums and take nothing.
"""

from dataclasses import replace

from model.network import ModelConfig
from pipeline.costs.operation_costs import KINDS, BatchShape, Costs, Family, Link, OperationCost
from pipeline.graph import Kind

RELATIVE = "arithmetic at one rate"
"""The origin of costs whose seconds mean nothing but parts of one device's step."""


def arithmetic_costs(
    config: ModelConfig,
    batch_size: int = 128,
    source_length: int = 29,
    target_length: int = 29,
    *,
    flop_per_s: float | None = None,
    one_device_step_s: float | None = None,
    link: Link | None = None,
    precision: str = "float32",
) -> Costs:
    """Return costs from a device's rate, or from its time for a whole step.

    A multiply-add is two operations of `flop_per_s`. With neither given, one device takes one
    second a step, which is enough for speedups. Lengths are padded positions.
    """
    assert flop_per_s is None or one_device_step_s is None, "give the rate or the step, not both"
    shape = BatchShape(batch_size, source_length, target_length)
    counted = Costs(config, shape, _counts(config), link or Link(), precision, origin=RELATIVE)
    if flop_per_s is not None:
        factor = 2.0 / flop_per_s
        counted = replace(counted, origin=f"arithmetic at {flop_per_s / 1e12:g} TFLOP/s")
    else:
        factor = (one_device_step_s or 1.0) / counted.one_device_s()
    return replace(counted, operations=scaled(counted, factor).operations)


def scaled(costs: Costs, factor: float, families: tuple[Family, ...] = ()) -> Costs:
    """Return costs with those of some families, or of all when none is named, times a factor."""
    return replace(
        costs,
        operations={
            (family, kind): _times(cost, factor) if not families or family in families else cost
            for (family, kind), cost in costs.operations.items()
        },
    )


def _counts(config: ModelConfig) -> dict[tuple[Family, Kind], OperationCost]:
    """Return multiply-adds in the place of seconds."""
    gates = 4.0 * config.hidden_size
    each: dict[Family, OperationCost] = {
        "first_projection": OperationCost(token_s=gates * config.embedding_size),
        "projection": OperationCost(token_s=gates * config.hidden_size),
        "recurrence": OperationCost(token_s=gates * config.hidden_size),
        "softmax": OperationCost(token_word_s=float(config.hidden_size)),
    }
    return {(family, kind): cost for family, cost in each.items() for kind in KINDS}


def _times(cost: OperationCost, factor: float) -> OperationCost:
    return OperationCost(
        cost.fixed_s * factor,
        cost.position_s * factor,
        cost.token_s * factor,
        cost.token_word_s * factor,
    )
