"""Measures real arithmetic on real ranks: the same training on one rank and on several, in turns.

All layouts are alive at once and take turns, one at work while the others idle, so that whatever
else the machine does falls on all of them. They train the same model on the same batches, so their
losses must agree. The most that the machine can give is measured in the same turns: as many
trainings of one rank at the same time as the largest layout has ranks, which share caches and
memory but never wait for each other.
"""

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.config import Config
from cluster.config.sections import ClusterConfig
from cluster.controller import STEPS_IN_FLIGHT
from cluster.layout import plan_of
from cluster.resources import connect
from cluster.tracking.run_metrics import StepOutcome
from cluster.training_comparison import Comparison, LayoutResult, Turn
from cluster.worker_group import WorkerGroup
from model.batching import Batch, make_batch
from model.errors import UserError
from model.network import ModelConfig
from pipeline.costs.operation_costs import BatchShape, Costs
from pipeline.plan import Plan
from pipeline.simulation.simulator import Simulation, simulate

DEFAULT_FIELDS: Mapping[str, Any] = {
    "name": "bench",
    "corpus": {
        "directory": "none",
        "train": {"folder": "none"},
        "source_vocabulary": {"size": 16_000},
        "target_vocabulary": {"size": 16_000},
    },
    "model": {"num_layers": 2, "hidden_size": 512, "embedding_size": 512},
    "training": {"batch_size": 128, "learning_rate": 0.7},
    "checkpoint": {"directory": "none"},
}
"""Small enough for two cores; half of the arithmetic is the softmax's, as in the paper."""
_SHARE_OF_CPU = 0.01
_NUM_BATCHES = 4


@dataclass(frozen=True)
class TrainingBenchSettings:
    """What is trained, and how often it is timed.

    Sentences have `shortest` to `longest` positions, the end symbol counted: a full batch where
    both are the same. In each of `num_rounds`, every layout makes `num_steps` timed steps in a row,
    after one to warm up. The ceiling needs as much memory again for each of its trainings.
    """

    model: ModelConfig
    num_sentences: int = 128
    shortest: int = 25
    longest: int = 25
    learning_rate: float = 0.7
    clip_norm: float | None = 5.0
    num_steps: int = 2
    num_rounds: int = 5
    with_ceiling: bool = True
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise UserError(
                f"sentences of {self.shortest} to {self.longest} positions cannot be drawn; use "
                "1 <= --shortest <= --longest"
            )

    @property
    def shape(self) -> BatchShape:
        """The padded shape of a batch."""
        return BatchShape(self.num_sentences, self.longest, self.longest)


def layout_plan(config: Config, num_ranks: int, settings: Mapping[str, Any], costs: Costs) -> Plan:
    """Return the plan for so many ranks; `settings` are those of the pipeline that are given.

    The planner chooses from the costs where no placement is given. Raises UserError.
    """
    fields = config.to_dict()
    fields["training"]["schedule"] = None
    longest = max(costs.batch.source_positions, costs.batch.target_positions)
    fields["corpus"]["max_length"] = max(1, longest - 1)
    fields["pipeline"] = _pipeline_fields(num_ranks, settings)
    config = Config.from_dict(fields, origin="the options of the bench")
    plan = plan_of(config, costs.model, costs=costs)
    if plan.num_workers != num_ranks:
        raise UserError(
            f"placement {plan.placement.name} has {plan.num_workers} ranks, where {num_ranks} were "
            "asked for; change --ranks, --replicas or --placement"
        )
    return plan


def _pipeline_fields(num_ranks: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    if num_ranks == 1:
        return {"placement": "single", "policy": "fill_drain"}
    replicas = settings.get("replicas", 1)
    if num_ranks % replicas:
        raise UserError(
            f"{num_ranks} ranks cannot be shared out among --replicas={replicas}; change one"
        )
    each = {"ranks": num_ranks // replicas, "layer_ranks": None}
    return {"placement": "auto", **each, **settings}


def random_batches(settings: TrainingBenchSettings) -> list[Batch]:
    """Draw the batches that all layouts read in turn: random words, the same at every call."""
    draw = random.Random(1)
    sizes = settings.model.source_vocabulary_size, settings.model.target_vocabulary_size

    def sentence(num_words: int) -> list[int]:
        length = draw.randint(settings.shortest, settings.longest)
        return [draw.randrange(2, max(num_words, 3)) for _ in range(length - 1)]

    return [
        make_batch(
            [(sentence(sizes[0]), sentence(sizes[1])) for _ in range(settings.num_sentences)]
        )
        for _ in range(_NUM_BATCHES)
    ]


def measure_training(
    plans: Mapping[str, Plan],
    costs: Costs,
    settings: TrainingBenchSettings,
    tell: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Train every layout and time them in turns; the first must be that of one rank.

    The ceiling are as many trainings of one rank as the largest layout has ranks. Raises UserError.
    """
    first = next(iter(plans.values()))
    assert first.num_workers == 1
    widest = max(plan.num_workers for plan in plans.values())
    members: dict[str, tuple[Plan, ...]] = {name: (plan,) for name, plan in plans.items()}
    if widest > 1 and settings.with_ceiling:
        members[f"{widest} independent"] = (first,) * widest
    turns = _turns(members, settings, tell)
    base = [turn.words_per_second for turn in next(iter(turns.values()))]
    results = tuple(
        _result(name, members[name], timed, base, costs) for name, timed in turns.items()
    )
    return Comparison(results[: len(plans)], results[-1] if len(results) > len(plans) else None)


def _result(
    name: str, plans: Sequence[Plan], turns: Sequence[Turn], base: Sequence[float], costs: Costs
) -> LayoutResult:
    simulations = [_simulation(plan, costs) for plan in plans]
    return LayoutResult(
        name=name,
        plans=tuple(plans),
        simulated_speedup=sum(simulation.speedup for simulation in simulations),
        turns=tuple(turns),
        speedups=tuple(turn.words_per_second / one for turn, one in zip(turns, base, strict=True)),
        simulated_memory_bytes=tuple(
            peak
            for plan, simulation in zip(plans, simulations, strict=True)
            for peak in simulation.peak_memory_bytes * plan.num_replicas
        ),
    )


def _simulation(plan: Plan, costs: Costs) -> Simulation:
    step = plan.training
    return simulate(
        step.schedule, step.graph, plan.placement, costs, num_replicas=plan.num_replicas
    )


def _turns(
    members: Mapping[str, tuple[Plan, ...]],
    settings: TrainingBenchSettings,
    tell: Callable[[str], None],
) -> dict[str, list[Turn]]:
    cluster = settings.cluster.model_copy(update={"cpus_per_rank": _SHARE_OF_CPU})
    num_workers = sum(plan.num_workers for plans in members.values() for plan in plans)
    batches = random_batches(settings)
    turns: dict[str, list[Turn]] = {name: [] for name in members}
    with connect(cluster, num_ranks=num_workers, warn=lambda line: None):
        tell(f"starting {num_workers} ranks, of which those of one layout at a time compute")
        with _started(members, cluster, settings) as trainings:
            for number in range(settings.num_rounds):
                for name, started in trainings.items():
                    turns[name].append(_turn(started, batches, settings))
                    rate = turns[name][-1].words_per_second
                    tell(f"round {number + 1}, {name}: {rate:,.0f} words/s")
    return turns


@contextmanager
def _started(
    members: Mapping[str, tuple[Plan, ...]], cluster: ClusterConfig, settings: TrainingBenchSettings
) -> Iterator[dict[str, list["_Training"]]]:
    trainings: dict[str, list[_Training]] = {name: [] for name in members}
    try:
        for name, plans in members.items():
            for plan in plans:
                group = WorkerGroup(plan, cluster, clip_norm=settings.clip_norm)
                trainings[name].append(_Training(group))
                group.start()
        yield trainings
    finally:
        for started in trainings.values():
            for training in started:
                training.group.shutdown()


@dataclass
class _Training:
    """A group of ranks, and the last step that was handed to it."""

    group: WorkerGroup
    step: int = 0

    def submit(self, batches: Sequence[Batch], learning_rate: float) -> None:
        self.group.submit_step(self.step + 1, batches[self.step % len(batches)], learning_rate)
        self.step += 1

    def cpu_s(self) -> float:
        """Return the processor time that its ranks took so far; 0 where the system is not Linux."""
        return sum(processor_s(status.pid) for status in self.group.statuses)


def processor_s(pid: int) -> float:
    """Return the processor time that a process took; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0  # another system, or the rank is on another node
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _turn(
    members: Sequence[_Training], batches: Sequence[Batch], settings: TrainingBenchSettings
) -> Turn:
    """Let trainings make their steps side by side, the next handed out before the last has ended.

    The clock runs from the end of the first step of all to the end of the last.
    """
    first, total = members[0].step, settings.num_steps + 1
    outcomes: list[list[StepOutcome]] = []
    ends: list[float] = []
    cpu_s: list[float] = []
    for index in range(total + STEPS_IN_FLIGHT - 1):
        if index < total:
            for training in members:
                training.submit(batches, settings.learning_rate)
        if index >= STEPS_IN_FLIGHT - 1:
            outcomes.append([training.group.collect_step() for training in members])
            ends.append(time.perf_counter())
            cpu_s.append(sum(training.cpu_s() for training in members))
    elapsed_s, spent_s = ends[-1] - ends[0], cpu_s[-1] - cpu_s[0]
    words = len(members) * sum(
        batches[step % len(batches)].num_words for step in range(first + 1, first + total)
    )
    timed = [_joined(step) for step in outcomes[1:]]
    return Turn(
        words_per_second=words / elapsed_s,
        words_per_cpu_s=words / spent_s if spent_s else None,
        rank_busy=_totals([busy for busy, _ in timed], elapsed_s),
        rank_wait=_totals([wait for _, wait in timed], elapsed_s),
        bytes_sent=sum(outcome.bytes_sent for outcome in outcomes[-1]),
        losses=tuple(step[0].loss.mean for step in outcomes),
        peak_memory_bytes=tuple(
            peak for outcome in outcomes[-1] for peak in outcome.peak_memory_bytes
        ),
    )


def _joined(step: Sequence[StepOutcome]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the ranks' busy and waiting times, of all trainings of a step in a row."""
    busy = tuple(seconds for outcome in step for seconds in outcome.busy_s)
    wait = tuple(seconds for outcome in step for seconds in outcome.wait_s)
    return busy, wait


def _totals(steps: Sequence[tuple[float, ...]], elapsed_s: float) -> tuple[float, ...]:
    return tuple(sum(rank) / elapsed_s for rank in zip(*steps, strict=True))
