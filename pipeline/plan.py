"""What a run over several ranks is made of, decided before it starts: the same data on every rank.

From a plan, each rank works out by itself the schedule that all of them follow, so nothing but the
plan has to be sent.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from model.errors import UserError
from model.network import BlockSpec, ModelConfig
from model.parameter import ParameterRows
from model.precision import Precision
from pipeline.costs.arithmetic import arithmetic_costs
from pipeline.costs.operation_costs import Costs
from pipeline.graph import Graph, Value, build_graph
from pipeline.placements.placement import Placement
from pipeline.schedules.policies import named_policy
from pipeline.schedules.schedule import Pair, Schedule, messages, validate
from pipeline.simulation.gradient_exchange import replica_costs


@dataclass(frozen=True)
class PlannedStep:
    """A graph, the validated schedule that runs it, and the messages that follow from both."""

    graph: Graph
    schedule: Schedule
    messages: Mapping[Pair, tuple[Value, ...]]


@dataclass(frozen=True)
class Plan:
    """Model, placement and order of a run; M microbatches a batch, K time chunks a side.

    All replicas follow the same order over their own shares of a batch. Worker w is rank
    `w % num_ranks` of replica `w // num_ranks`.

    It is checked when it is made: PlacementError, or UserError for an unknown policy or precision
    and for counts below one. Schedules are worked out on first use, by policies that look at costs
    with `costs`, or with counts of arithmetic where there are none.
    """

    model: ModelConfig
    placement: Placement
    policy: str = "wavefront"
    num_microbatches: int = 1
    num_chunks: int = 1
    precision: str = "float32"
    seed: int = 1
    costs: Costs | None = None
    num_replicas: int = 1

    def __post_init__(self) -> None:
        named_policy(self.policy)
        Precision(self.precision)
        for key, count in (
            ("microbatches", self.num_microbatches),
            ("time_chunks", self.num_chunks),
            ("replicas", self.num_replicas),
        ):
            if count < 1:
                raise UserError(f"pipeline.{key}={count} is too few; use 1 or more")
        self.placement.check(self.model)
        if self.costs is not None:
            self.costs.check(self.model)

    def __getstate__(self) -> dict[str, Any]:
        # Schedules are large and quickly made again, so they do not travel.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def num_ranks(self) -> int:
        """The ranks of one replica."""
        return self.placement.num_ranks

    @property
    def num_workers(self) -> int:
        """The ranks of all replicas."""
        return self.num_ranks * self.num_replicas

    @cached_property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """All blocks, in forward order."""
        return self.placement.blocks(self.model)

    def blocks_of(self, rank: int) -> tuple[BlockSpec, ...]:
        """Return the blocks that a rank owns, in forward order."""
        return tuple(spec for spec in self.blocks if self.placement.rank_of[spec.name] == rank)

    @cached_property
    def parameter_rows(self) -> tuple[ParameterRows, ...]:
        """All pieces of all parameters, in the one order in which sums over them run.

        That is the order of the model's parameters, with the shards of one in the order of words.
        """
        pieces: list[ParameterRows] = []
        for name, shape in self.model.parameter_shapes().items():
            cuts = self.placement.shards if name.startswith("softmax.") else ((0, shape[0]),)
            pieces.extend(ParameterRows(name, shape, start, stop) for start, stop in cuts)
        return tuple(pieces)

    @cached_property
    def training(self) -> PlannedStep:
        """Forward, input gradients and weight gradients of one batch."""
        return self._planned(training=True)

    @cached_property
    def evaluation(self) -> PlannedStep:
        """The forward operations of one batch."""
        return self._planned(training=False)

    def _planned(self, *, training: bool) -> PlannedStep:
        graph = build_graph(self.blocks, self.num_microbatches, self.num_chunks, training=training)
        costs = self.costs or arithmetic_costs(self.model, precision=self.precision)
        costs = replica_costs(costs, self.num_replicas)
        schedule = named_policy(self.policy)(graph, self.placement, costs=costs)
        validate(schedule, graph, self.placement)
        return PlannedStep(graph, schedule, messages(schedule, graph, self.placement))
