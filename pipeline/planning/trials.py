"""Trials: a layout with a policy and a cut, simulated; placements and graphs are made once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from model.network import ModelConfig
from pipeline.costs.operation_costs import Costs
from pipeline.graph import Graph, build_graph
from pipeline.placements.named import named_placement
from pipeline.placements.placement import Placement, PlacementError
from pipeline.planning.bounds import shortest_step_s
from pipeline.planning.candidate import Candidate, rounded
from pipeline.planning.cuts import MICROBATCHES, Cut, Cuts
from pipeline.planning.layouts import SEARCHED, Layout
from pipeline.schedules.policies import POLICIES, named_policy
from pipeline.schedules.schedule import Schedule
from pipeline.simulation.gradient_exchange import replica_costs
from pipeline.simulation.simulator import StepTimes, simulation_of, step_times

MAX_OPERATIONS = 100_000
"""Simulated operations of a search: some seconds, however many devices there are."""


class Trial(NamedTuple):
    """A question to the simulator."""

    layout: Layout
    policy: str
    cut: Cut

    def num_operations(self, model: ModelConfig) -> int:
        """Return about how many operations are ordered and simulated for it."""
        num_blocks = 4 * model.num_layers + 3 + self.layout.num_ranks
        num_orders = 2 if self.policy == "priority_list" else 1
        return 3 * num_blocks * self.cut[0] * self.cut[1] * num_orders


@dataclass(frozen=True)
class Outcome:
    """A trial with its answer; the schedule is that of one replica."""

    trial: Trial
    placement: Placement
    graph: Graph
    schedule: Schedule
    times: StepTimes
    step_s: float

    def place(self) -> tuple[float, int]:
        """Sort by time; a difference that is rounding must not decide, but the smaller schedule."""
        return rounded(self.step_s), self.trial.cut[0] * self.trial.cut[1]


@dataclass(frozen=True)
class SearchSettings:
    """The grid, and how much of it may be simulated; `use_all` leaves no device without work."""

    policies: Sequence[str] = tuple(POLICIES)
    microbatches: Sequence[int] = MICROBATCHES
    time_chunks: Sequence[int] | None = None
    use_all: bool = False
    max_operations: int = MAX_OPERATIONS
    memory_bytes: int | None = None
    recomputes_logits: bool = False


@dataclass
class Trials:
    """What was simulated so far, by layout, and how many operations that took.

    `costs` are those of the whole batch.
    """

    model: ModelConfig
    costs: Costs
    settings: SearchSettings
    outcomes: dict[Layout, dict[Trial, Outcome]] = field(default_factory=dict)
    _spent: int = 0
    _placements: dict[tuple[Layout, Cut], Placement | None] = field(default_factory=dict)
    _least_s: dict[tuple[Layout, Cut], float] = field(default_factory=dict)
    _graphs: dict[tuple[Layout, Cut], Graph] = field(default_factory=dict)
    _shares: dict[int, tuple[Costs, Cuts]] = field(default_factory=dict)

    def run(self, trial: Trial, *, must: bool = False) -> None:
        """Simulate a trial, unless that was done, cannot be done or would cost too much."""
        done = self.outcomes.get(trial.layout, {})
        if trial in done or not (must or self.affordable(trial)):
            return
        placement = self.placement(trial.layout, trial.cut)
        if placement is None or self._is_repeated(trial, placement):
            return
        self._spent += trial.num_operations(self.model)
        costs, graph = self.costs_of(trial.layout), self._graph(trial, placement)
        schedule = named_policy(trial.policy)(graph, placement, costs=costs)
        times = step_times(schedule, graph, placement, costs, trial.layout.num_replicas)
        outcome = Outcome(trial, placement, graph, schedule, times, times.step_s)
        self.outcomes.setdefault(trial.layout, {})[trial] = outcome

    def affordable(self, trial: Trial) -> bool:
        """Whether enough operations are left."""
        return self._spent + trial.num_operations(self.model) <= self.settings.max_operations

    def ranked(self, layout: Layout) -> list[Outcome]:
        """Return a layout's outcomes, the fastest first."""
        return sorted(self.outcomes[layout].values(), key=Outcome.place)

    def fastest(self, layout: Layout) -> Outcome:
        """Return a layout's fastest outcome."""
        return min(self.outcomes[layout].values(), key=Outcome.place)

    def fastest_s(self, layout: Layout) -> float:
        """Return the step of a layout's fastest outcome."""
        return self.fastest(layout).step_s

    def hopeless(self, trial: Trial) -> bool:
        """Whether no order of the trial's work can be the fastest of all.

        Under a memory bound the fastest so far may not fit, so nothing is ruled out.
        """
        least_s = self.least_s(trial.layout, trial.cut)
        if least_s == float("inf") or self.settings.memory_bytes is not None:
            return least_s == float("inf")
        fastest_s = min(map(self.fastest_s, self.outcomes), default=float("inf"))
        return rounded(least_s) >= rounded(fastest_s)

    def least_s(self, layout: Layout, cut: Cut) -> float:
        """Return seconds that no order of a layout's work can go below."""
        if (layout, cut) not in self._least_s:
            placement = self.placement(layout, cut)
            self._least_s[layout, cut] = (
                float("inf")
                if placement is None
                else shortest_step_s(placement, self.costs_of(layout), layout.num_replicas)
            )
        return self._least_s[layout, cut]

    def placement(self, layout: Layout, cut: Cut) -> Placement | None:
        """Make a placement; None where it cannot be cut, for example for more ranks than words."""
        if (layout, cut) not in self._placements:
            try:
                made = named_placement(
                    layout.name,
                    self.model,
                    num_ranks=layout.num_ranks,
                    costs=self.costs_of(layout),
                    num_microbatches=cut[0],
                    num_chunks=cut[1],
                    recomputes_logits=self.settings.recomputes_logits,
                )
            except PlacementError:
                made = None
            self._placements[layout, cut] = made
        return self._placements[layout, cut]

    def costs_of(self, layout: Layout) -> Costs:
        """Return the costs of a replica's share of the batch."""
        return self._share(layout.num_replicas)[0]

    def cuts_of(self, layout: Layout) -> Cuts:
        """Return the ways to cut a replica's share of the batch."""
        return self._share(layout.num_replicas)[1]

    def candidate(self, outcome: Outcome) -> Candidate:
        """Work out all that is to be known of an outcome."""
        trial, bound = outcome.trial, self.settings.memory_bytes
        simulation = simulation_of(
            outcome.times,
            outcome.schedule,
            outcome.graph,
            outcome.placement,
            self.costs,
            trial.layout.num_replicas,
        )
        return Candidate(
            placement=outcome.placement,
            policy=trial.policy,
            num_microbatches=trial.cut[0],
            num_chunks=trial.cut[1],
            schedule=outcome.schedule,
            simulation=simulation,
            end_on_free_link_s=outcome.times.end_on_free_link_s(),
            fits=bound is None or max(simulation.peak_memory_bytes) <= bound,
        )

    def _is_repeated(self, trial: Trial, placement: Placement) -> bool:
        """Whether a placement that is named earlier is the same but for the ranks' numbers."""
        for name in (
            SEARCHED[: SEARCHED.index(trial.layout.name)] if placement.num_ranks > 1 else ()
        ):
            earlier = self.placement(trial.layout._replace(name=name), trial.cut)
            if earlier is not None and _pattern(earlier) == _pattern(placement):
                return True
        return False

    def _graph(self, trial: Trial, placement: Placement) -> Graph:
        key = trial.layout, trial.cut
        if key not in self._graphs:
            blocks = placement.blocks(self.model)
            self._graphs[key] = build_graph(blocks, *trial.cut, training=True)
        return self._graphs[key]

    def _share(self, num_replicas: int) -> tuple[Costs, Cuts]:
        if num_replicas not in self._shares:
            costs, settings = replica_costs(self.costs, num_replicas), self.settings
            cuts = Cuts.of(costs.batch, settings.microbatches, settings.time_chunks)
            self._shares[num_replicas] = costs, cuts
        return self._shares[num_replicas]


def _pattern(placement: Placement) -> object:
    """Return what is left of a placement when its ranks are numbered as they appear."""
    numbers: dict[int, int] = {}
    blocks = [
        (block, numbers.setdefault(rank, len(numbers)))
        for block, rank in sorted(placement.rank_of.items())
    ]
    return placement.shards, blocks
