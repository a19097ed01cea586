"""Chooses a layout: tries placements, policies and cuts in the simulator, and ranks what it found.

No layout wins everywhere, so nothing is assumed of any: the costs decide. How much is tried is
bounded by a number of simulated operations and not by a clock, so the same question always gets the
same answer. Where that bound does not cut the search short, everything in the grid was tried.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from model.network import ModelConfig
from model.precision import Precision
from pipeline.costs.operation_costs import BatchShape, Costs
from pipeline.graph import Graph, build_graph
from pipeline.placements.named import named_placement
from pipeline.placements.placement import Placement, PlacementError
from pipeline.planning.reasons import why
from pipeline.schedules.policies import POLICIES, named_policy
from pipeline.schedules.schedule import Schedule
from pipeline.simulation.gradient_exchange import gradient_exchange_s, replica_costs
from pipeline.simulation.memory import parameter_bytes
from pipeline.simulation.simulator import Simulation, simulate, start_times
from pipeline.simulation.timed_graph import time_graph

DATA_PARALLEL = "data_parallel"
SEARCHED = ("paper", "uneven", "separate", "split")
MAX_OPERATIONS = 45_000
"""Simulated operations of a search: some seconds, however many devices there are."""
MICROBATCHES = (1, 2, 4, 8)
_COARSE_POLICY = "deferred_weights"
_NUM_FITTING_TRIES = 12

_Layout = tuple[str, int]
"""A placement's name and its number of ranks."""


@dataclass(frozen=True)
class Candidate:
    """A layout with the fastest order that was found for it, and what the simulator says of it.

    `simulation` is that of one replica with its part of the batch; `exchange_s` is the sum of
    gradients over replicas behind it, with nothing hidden. `runs` is false for what can be
    simulated but not yet trained. `fits` says whether it keeps to the memory bound.
    """

    name: str
    placement: Placement
    policy: str
    num_microbatches: int
    num_chunks: int
    schedule: Schedule
    simulation: Simulation
    one_device_s: float
    num_replicas: int = 1
    exchange_s: float = 0.0
    exchange_bytes: int = 0
    fits: bool = True
    runs: bool = True
    why: str = ""

    @property
    def num_devices(self) -> int:
        """Ranks of all replicas."""
        return self.placement.num_ranks * self.num_replicas

    @property
    def step_s(self) -> float:
        """The whole step, gradients summed."""
        return self.simulation.step_seconds + self.exchange_s

    @property
    def speedup(self) -> float:
        """How many times faster than one device with the whole batch."""
        return self.one_device_s / self.step_s if self.step_s else 1.0

    @property
    def hidden_speedup(self) -> float:
        """The same if the sum over replicas cost no time, which is the most that hiding gives."""
        step_s = self.simulation.step_seconds
        return self.one_device_s / step_s if step_s else 1.0

    @property
    def busy_fraction(self) -> float:
        """The part of all devices' time that goes into operations."""
        total = self.placement.num_ranks * self.step_s
        return sum(self.simulation.busy_s) / total if total else 0.0

    @property
    def peak_memory_bytes(self) -> int:
        """What the fullest device holds."""
        return max(self.simulation.peak_memory_bytes)

    @property
    def bytes_sent(self) -> int:
        """What all devices send in a step."""
        each = sum(self.simulation.bytes_sent) + self.exchange_bytes * self.placement.num_ranks
        return each * self.num_replicas


def plan(
    model: ModelConfig,
    num_devices: int,
    costs: Costs,
    batch: BatchShape | None = None,
    memory_bytes: int | None = None,
    *,
    policies: Sequence[str] = tuple(POLICIES),
    microbatches: Sequence[int] = MICROBATCHES,
    time_chunks: Sequence[int] | None = None,
    use_all: bool = False,
    max_operations: int = MAX_OPERATIONS,
) -> list[Candidate]:
    """Return the best candidate of every layout, the fastest first; those that do not fit are last.

    Layouts are the named placements on all devices, one device, plain data parallelism and, unless
    `use_all`, placements on half of the devices and so on. `batch` replaces the shape that the
    costs are for. Raises CostsError if the costs are those of another model.
    """
    if num_devices < 1:
        raise PlacementError(f"{num_devices} devices are too few to plan for; use 1 or more")
    costs.check(model)
    costs = costs if batch is None else replace(costs, batch=batch)
    for policy in policies:
        named_policy(policy)
    search = _Search(model, costs, memory_bytes, max_operations)
    cuts = _Cuts.of(costs.batch, microbatches, time_chunks)
    search.run(num_devices, policies, cuts, use_all=use_all)
    candidates = [search.best(layout) for layout in search.layouts()]
    if num_devices > 1:
        candidates.append(data_parallel(model, num_devices, costs, memory_bytes))
    explained = [replace(candidate, why=why(candidate, costs)) for candidate in candidates]
    return sorted(explained, key=_place)


def best_of(candidates: Sequence[Candidate]) -> Candidate:
    """Return the fastest candidate that can be trained and fits.

    Raises PlacementError if none fits.
    """
    for candidate in candidates:
        if candidate.runs and candidate.fits:
            return candidate
    runnable = [candidate for candidate in candidates if candidate.runs]
    if not runnable:
        raise PlacementError(
            f"no placement can be cut for {candidates[0].num_devices} devices; use fewer"
        )
    least = min(candidate.peak_memory_bytes for candidate in runnable)
    raise PlacementError(
        f"no layout fits the memory bound: the smallest needs {least / 1e9:.2f} GB on its fullest "
        "device; use more devices, a smaller batch or a higher bound"
    )


def data_parallel(
    model: ModelConfig, num_devices: int, costs: Costs, memory_bytes: int | None = None
) -> Candidate:
    """Return plain data parallelism: the whole model on every device, a part of the batch each.

    Its step counts the sum of the gradients as fully exposed; `hidden_speedup` is the other end.
    """
    each = replica_costs(costs, num_devices)
    placement = named_placement("single", model, costs=costs)
    graph = build_graph(placement.blocks(model), 1, 1, training=True)
    schedule = named_policy("fill_drain")(graph, placement, costs=each)
    simulation = simulate(schedule, graph, placement, each)
    exchange_s, exchange_bytes = gradient_exchange_s(placement, each, num_devices)
    fits = memory_bytes is None or max(simulation.peak_memory_bytes) <= memory_bytes
    return Candidate(
        name=DATA_PARALLEL,
        placement=placement,
        policy="fill_drain",
        num_microbatches=1,
        num_chunks=1,
        schedule=schedule,
        simulation=simulation,
        one_device_s=costs.one_device_s(),
        num_replicas=num_devices,
        exchange_s=exchange_s,
        exchange_bytes=exchange_bytes,
        fits=fits,
        runs=False,
    )


def _place(candidate: Candidate) -> tuple[bool, float, int]:
    size = candidate.num_microbatches * candidate.num_chunks
    return not candidate.fits, _rounded(candidate.step_s), size


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.9g}")


@dataclass(frozen=True)
class _Cuts:
    """The grid of M and K, and the few points of it that every placement is tried at."""

    coarse: tuple[tuple[int, int], ...]
    all: tuple[tuple[int, int], ...]

    @staticmethod
    def of(
        batch: BatchShape, microbatches: Sequence[int], time_chunks: Sequence[int] | None
    ) -> "_Cuts":
        longest = max(batch.source_positions, batch.target_positions)
        counts = sorted({num for num in microbatches if num <= batch.num_sentences}) or [1]
        if time_chunks is None:
            time_chunks = (1, 2, 4, 8, 16, -(-longest // 2), longest)
        chunks = sorted({min(num, longest) for num in time_chunks})
        grid = tuple(product(counts, chunks))
        # The smallest one stands last; it is tried however many devices there are.
        finest, middle = chunks[-1], chunks[len(chunks) // 2]
        wanted = ((1, finest), (2, middle), (4, middle), (1, middle))
        coarse = tuple(dict.fromkeys(point for point in wanted if point in grid))
        return _Cuts(coarse or grid[:1], grid)

    def beside(self, num_microbatches: int, num_chunks: int) -> list[tuple[int, int]]:
        """Return the points of the grid with the next smaller or larger M or K."""
        counts = sorted({m for m, _ in self.all})
        chunks = sorted({k for _, k in self.all})
        m, k = counts.index(num_microbatches), chunks.index(num_chunks)
        near = ((m, k + 1), (m + 1, k), (m, k - 1), (m - 1, k))
        return [
            (counts[i], chunks[j]) for i, j in near if 0 <= i < len(counts) and 0 <= j < len(chunks)
        ]


@dataclass(frozen=True)
class _Trial:
    """A question to the simulator."""

    name: str
    num_ranks: int
    policy: str
    num_microbatches: int
    num_chunks: int

    @property
    def layout(self) -> _Layout:
        return self.name, self.num_ranks


@dataclass(frozen=True)
class _Outcome:
    trial: _Trial
    placement: Placement
    graph: Graph
    schedule: Schedule
    step_s: float

    def place(self) -> tuple[float, int]:
        """Sort by time; a difference that is rounding must not decide, but the smaller schedule."""
        return _rounded(self.step_s), self.trial.num_microbatches * self.trial.num_chunks


class _Search:
    """What was tried so far, and how many operations that took."""

    def __init__(
        self, model: ModelConfig, costs: Costs, memory_bytes: int | None, max_operations: int
    ) -> None:
        self._model, self._costs = model, costs
        self._memory_bytes = memory_bytes
        self._operations_left = max_operations
        self._outcomes: dict[_Trial, _Outcome] = {}

    def run(self, num_devices: int, policies: Sequence[str], cuts: _Cuts, *, use_all: bool) -> None:
        """Try every placement at a few cuts, then better cuts and policies, then all that is left.

        What is left is tried as long as there are operations to spend, the most promising first.
        """
        if num_devices == 1 or not use_all:
            self._try(_Trial("single", 1, "fill_drain", 1, 1), must=True)
        if num_devices == 1:
            return
        full = [(name, num_devices) for name in SEARCHED]
        first = _COARSE_POLICY if _COARSE_POLICY in policies else policies[0]
        self._try_coarse(full, first, cuts.coarse)
        if not use_all:
            self._try_coarse(_smaller(full), first, cuts.coarse[-1:])
        for layout in sorted(self._known(full), key=self._fastest):
            self._climb(layout, first, cuts)
            best = self._fastest_of(layout).trial
            for policy in policies:
                self._try(replace(best, policy=policy))
        rest = [
            _Trial(*layout, policy, m, k)
            for layout, policy, (m, k) in product(self._known(full), policies, cuts.all)
        ]
        for trial in sorted(rest, key=self._promise):
            self._try(trial)

    def _try_coarse(
        self, layouts: Sequence[_Layout], policy: str, cuts: Sequence[tuple[int, int]]
    ) -> None:
        for (m, k), layout in product(reversed(cuts), layouts):
            self._try(_Trial(*layout, policy, m, k), must=(m, k) == cuts[-1])

    def _climb(self, layout: _Layout, policy: str, cuts: _Cuts) -> None:
        """Go from the best known cut to a better one beside it, as long as there is one."""
        while True:
            best = self._fastest_of(layout).trial
            for m, k in cuts.beside(best.num_microbatches, best.num_chunks):
                self._try(_Trial(*layout, policy, m, k))
            if self._fastest_of(layout).trial == best:
                return

    def _known(self, layouts: Sequence[_Layout]) -> list[_Layout]:
        possible = {trial.layout for trial in self._outcomes}
        return [layout for layout in layouts if layout in possible]

    def _fastest_of(self, layout: _Layout) -> _Outcome:
        return self._ranked(layout)[0]

    def _fastest(self, layout: _Layout) -> float:
        return self._fastest_of(layout).step_s

    def _ranked(self, layout: _Layout) -> list[_Outcome]:
        outcomes = [found for trial, found in self._outcomes.items() if trial.layout == layout]
        return sorted(outcomes, key=_Outcome.place)

    def layouts(self) -> list[_Layout]:
        """Return the placements that could be made, with their numbers of ranks.

        On fewer ranks than there are, a placement counts only if it is faster there.
        """
        found = list(dict.fromkeys(trial.layout for trial in self._outcomes))
        if not found:
            return []
        most = max(num_ranks for _, num_ranks in found)
        return [
            (name, num_ranks)
            for name, num_ranks in found
            if (name, most) not in found
            or num_ranks == most
            or self._fastest((name, num_ranks)) < self._fastest((name, most))
        ]

    def best(self, layout: _Layout) -> Candidate:
        """Return the fastest outcome of a layout that fits, or the fastest if none does."""
        outcomes = self._ranked(layout)
        found = self._candidate(outcomes[0])
        if found.fits or self._parameters_alone_exceed(outcomes[0].placement):
            return found
        for outcome in _fewest_kept_too(outcomes):
            candidate = self._candidate(outcome)
            if candidate.fits:
                return candidate
        return found

    def _try(self, trial: _Trial, *, must: bool = False) -> None:
        if trial in self._outcomes:
            return
        weight = 2 if trial.policy == "priority_list" else 1
        num_operations = weight * _num_operations(trial, self._model)
        if num_operations > self._operations_left and not must:
            return
        costs = self._costs
        try:
            placement = named_placement(
                trial.name,
                self._model,
                num_ranks=trial.num_ranks,
                costs=costs,
                num_microbatches=trial.num_microbatches,
                num_chunks=trial.num_chunks,
            )
        except PlacementError:
            # This placement cannot be cut for so many ranks, for example more ranks than words.
            return
        self._operations_left -= num_operations
        graph = self._graph(trial, placement)
        schedule = named_policy(trial.policy)(graph, placement, costs=costs)
        timed = time_graph(graph, placement, costs)
        number = graph.numbered.number
        starts = start_times(timed, [[number[op] for op in rank] for rank in schedule.operations])
        step_s = max(map(sum, zip(starts, timed.seconds, strict=True)))
        self._outcomes[trial] = _Outcome(trial, placement, graph, schedule, step_s)

    def _graph(self, trial: _Trial, placement: Placement) -> Graph:
        """Build the graph of a trial, or take the one that another policy was tried on."""
        for done, outcome in self._outcomes.items():
            if replace(done, policy=trial.policy) == trial:
                return outcome.graph
        blocks = placement.blocks(self._model)
        return build_graph(blocks, trial.num_microbatches, trial.num_chunks, training=True)

    def _promise(self, trial: _Trial) -> tuple[float, int]:
        """Sort by what is known of the placement at this point of the grid, or of it elsewhere."""
        known = [outcome for done, outcome in self._outcomes.items() if done.layout == trial.layout]
        cut = trial.num_microbatches, trial.num_chunks
        here = [
            outcome.step_s
            for outcome in known
            if (outcome.trial.num_microbatches, outcome.trial.num_chunks) == cut
        ]
        anywhere = [outcome.step_s for outcome in known]
        return min(here or anywhere, default=float("inf")), _num_operations(trial, self._model)

    def _candidate(self, outcome: _Outcome) -> Candidate:
        trial, placement = outcome.trial, outcome.placement
        simulation = simulate(outcome.schedule, outcome.graph, placement, self._costs)
        bound = self._memory_bytes
        return Candidate(
            name=trial.name,
            placement=placement,
            policy=trial.policy,
            num_microbatches=trial.num_microbatches,
            num_chunks=trial.num_chunks,
            schedule=outcome.schedule,
            simulation=simulation,
            one_device_s=simulation.one_device_s,
            fits=bound is None or max(simulation.peak_memory_bytes) <= bound,
        )

    def _parameters_alone_exceed(self, placement: Placement) -> bool:
        held = [0] * placement.num_ranks
        for spec in placement.blocks(self._model):
            held[placement.rank_of[spec.name]] += parameter_bytes(
                spec, self._model, Precision(self._costs.precision)
            )
        return self._memory_bytes is not None and max(held) > self._memory_bytes


def _fewest_kept_too(outcomes: Sequence[_Outcome]) -> list[_Outcome]:
    """Return the fastest outcomes, and then those of the policy that keeps least."""
    fastest = list(outcomes[1 : 1 + _NUM_FITTING_TRIES])
    frugal = [outcome for outcome in outcomes if outcome.trial.policy == "1f1b"]
    return fastest + frugal[:_NUM_FITTING_TRIES]


def _smaller(layouts: Sequence[_Layout]) -> list[_Layout]:
    """Return the layouts on half of the devices, and on a quarter."""
    return [
        (name, ranks // part) for part in (2, 4) for name, ranks in layouts if ranks // part >= 2
    ]


def _num_operations(trial: _Trial, model: ModelConfig) -> int:
    num_blocks = 4 * model.num_layers + 3 + trial.num_ranks
    return 3 * num_blocks * trial.num_microbatches * trial.num_chunks
