"""Measures what a pipeline reaches with emulated devices, beside what the simulator promises.

The ranks are real: actors, schedules, messages of the true sizes. Only the arithmetic is replaced
by waits for its planned time (`pipeline.emulation`), so what is measured is orchestration. One set
of actors runs all placements, one after another.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field

from cluster.config.sections import ClusterConfig
from cluster.controller import STEPS_IN_FLIGHT
from cluster.resources import connect
from cluster.tracking.run_metrics import StepOutcome
from cluster.worker_group import WorkerGroup
from model.batching import Batch
from model.network import ModelConfig
from pipeline.costs.arithmetic import arithmetic_costs
from pipeline.costs.operation_costs import BatchShape, Costs, Link
from pipeline.costs.profiling import full_batch
from pipeline.placements.named import named_placement
from pipeline.plan import Plan
from pipeline.planning.candidate import DATA_PARALLEL
from pipeline.simulation.gradient_exchange import replica_costs
from pipeline.simulation.simulator import Simulation, simulate

PAPER_SPEEDUP = 3.71
"""6,300 words/s on 8 GPUs against 1,700 on one (Sutskever et al. 2014, section 3.5)."""
PAPER_STEP_S = 4.4
"""One step on one of the paper's GPUs: 128 pairs of 58 words at 1,700 words/s."""
PAPER_MODEL = ModelConfig(source_vocabulary_size=160_000, target_vocabulary_size=80_000)
PAPER_BATCH = BatchShape(num_sentences=128, source_positions=29, target_positions=29)
PAPER_FLOP_PER_S = (
    arithmetic_costs(PAPER_MODEL, *astuple(PAPER_BATCH), flop_per_s=1.0).one_device_s()
    / PAPER_STEP_S
)
"""The rate of one of the paper's GPUs, by multiply-adds as two operations: 0.73 TFLOP/s."""


@dataclass(frozen=True)
class Case:
    """A placement and its order; with `fused`, I and W of a block are one operation.

    `replicas` share the batch, and the devices.
    """

    placement: str
    policy: str
    microbatches: int
    time_chunks: int
    fused: bool = False
    note: str = ""
    replicas: int = 1

    @property
    def name(self) -> str:
        """The placement's name, or that of replicas of the whole model."""
        return DATA_PARALLEL if self.placement == "single" else self.placement


PAPER_CASE = Case("paper", "fill_drain", 1, 1, fused=True, note="the paper's own schedule")
CASES: tuple[Case, ...] = (
    PAPER_CASE,
    Case("paper", "fill_drain", 4, 1, fused=True, note="as GPipe"),
    Case("paper", "1f1b", 4, 1, fused=True),
    Case("paper", "wavefront", 1, 29, fused=True),
    Case("paper", "deferred_weights", 1, 29),
    Case("paper", "deferred_weights", 4, 4),
    Case("uneven", "priority_list", 4, 4),
    Case("separate", "priority_list", 4, 4),
    Case("split", "deferred_weights", 1, 10),
    Case("split", "deferred_weights", 1, 29),
)
NUM_QUICK = 3
MOST_RANKS = 8
"""With more devices than these, replicas of pipelines of so many ranks are tried as well."""


@dataclass(frozen=True)
class BenchSettings:
    """What to measure: devices of a rate, links as they are counted with, and how many steps.

    `time_scale` divides the waits; the figures stand for devices so much faster. The links are
    those of schedules, of simulations and of the sums over replicas; messages between ranks take
    what they really take.
    """

    num_devices: int = 8
    model: ModelConfig = PAPER_MODEL
    batch: BatchShape = PAPER_BATCH
    flop_per_s: float = PAPER_FLOP_PER_S
    time_scale: float = 1.0
    link: Link = field(default_factory=Link)
    num_steps: int = 5
    num_warmup_steps: int = 2
    shared_memory: bool = True

    def costs(self) -> Costs:
        """Return the costs of the emulated devices."""
        return arithmetic_costs(
            self.model,
            self.batch.num_sentences,
            self.batch.source_positions,
            self.batch.target_positions,
            flop_per_s=self.flop_per_s * self.time_scale,
            link=self.link,
        )


@dataclass(frozen=True)
class Prediction:
    """A case with its plan and its simulation."""

    case: Case
    plan: Plan
    simulation: Simulation


@dataclass(frozen=True)
class Measurement:
    """A case's medians over its steps.

    `step_s` is from the end of a step to the end of the next; `busy_s`, `wait_s` and
    `orchestration_s` share out a rank's time, in the mean over ranks: in operations, blocked on
    other ranks, and everything else.
    """

    case: Case
    num_devices: int
    simulated_speedup: float
    measured_speedup: float
    step_s: float
    busy_s: float
    wait_s: float
    orchestration_s: float
    bytes_sent: int

    @property
    def ratio(self) -> float:
        """Measured over simulated."""
        return self.measured_speedup / self.simulated_speedup


def cases(num_devices: int) -> tuple[Case, ...]:
    """Return what is measured on so many devices: data parallelism comes last."""
    replicas = num_devices // MOST_RANKS
    side_by_side = (Case("separate", "priority_list", 4, 4, replicas=replicas),)
    return (
        *CASES,
        *(side_by_side if replicas > 1 and num_devices % MOST_RANKS == 0 else ()),
        Case("single", "fill_drain", 1, 1, fused=True, replicas=num_devices),
    )


def predict(case: Case, settings: BenchSettings) -> Prediction:
    """Plan a case, and simulate it.

    Raises PlacementError where the placement does not fit so many devices.
    """
    costs = settings.costs().fused() if case.fused else settings.costs()
    placement = named_placement(
        case.placement,
        settings.model,
        num_ranks=settings.num_devices // case.replicas,
        costs=replica_costs(costs, case.replicas),
        num_microbatches=case.microbatches,
        num_chunks=case.time_chunks,
    )
    plan = Plan(
        settings.model,
        placement,
        case.policy,
        case.microbatches,
        case.time_chunks,
        costs=costs,
        num_replicas=case.replicas,
    )
    step = plan.training
    simulation = simulate(step.schedule, step.graph, placement, costs, num_replicas=case.replicas)
    return Prediction(case, plan, simulation)


def best(predictions: Sequence[Prediction], count: int) -> list[Prediction]:
    """Return the fastest prediction of each of the `count` best placements.

    Data parallelism is not one of them: on free links it is always the best, and needs no pipeline.
    """
    placed = [found for found in predictions if found.case.name != DATA_PARALLEL]
    ranked = sorted(placed, key=lambda found: -found.simulation.speedup)
    first: dict[str, Prediction] = {}
    for found in ranked:
        first.setdefault(found.case.name, found)
    return list(first.values())[:count]


def measure(
    predictions: Sequence[Prediction],
    settings: BenchSettings,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[Measurement]:
    """Start the ranks once, and measure one case after another."""
    cluster = ClusterConfig(device="emulated", shared_memory=settings.shared_memory)
    batch = full_batch(settings.batch)
    with connect(cluster, num_ranks=settings.num_devices, warn=lambda line: None):
        tell(f"starting {settings.num_devices} ranks")
        group = WorkerGroup(predictions[0].plan, cluster)
        group.start()
        try:
            for found in predictions:
                tell(f"{found.case.name}, {found.case.policy}")
                group.replan(found.plan)
                yield _measured(found, group, batch, settings)
        finally:
            group.shutdown()


def machine_note() -> str:
    """Say what the measurement shared the machine with."""
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores, load {load:.1f} before the measurement"


def _measured(
    found: Prediction, group: WorkerGroup, batch: Batch, settings: BenchSettings
) -> Measurement:
    ends, outcomes = _run_steps(group, batch, settings.num_warmup_steps + settings.num_steps)
    first = settings.num_warmup_steps
    periods = [ends[index] - ends[index - 1] for index in range(first, len(ends))]
    timed = outcomes[first:]
    ranks = settings.num_devices
    step_s = statistics.median(periods)
    busy_s = statistics.median(sum(outcome.busy_s) / ranks for outcome in timed)
    wait_s = statistics.median(sum(outcome.wait_s) / ranks for outcome in timed)
    return Measurement(
        case=found.case,
        num_devices=ranks,
        simulated_speedup=found.simulation.speedup,
        measured_speedup=found.simulation.one_device_s / step_s,
        step_s=step_s,
        busy_s=busy_s,
        wait_s=wait_s,
        orchestration_s=step_s - busy_s - wait_s,
        bytes_sent=timed[-1].bytes_sent,
    )


def _run_steps(
    group: WorkerGroup, batch: Batch, num_steps: int
) -> tuple[list[float], list[StepOutcome]]:
    """Run steps as a training does, the next handed out before the last has ended."""
    ends: list[float] = []
    outcomes: list[StepOutcome] = []
    for step in range(num_steps + STEPS_IN_FLIGHT - 1):
        if step < num_steps:
            group.submit_step(step + 1, batch, 0.0)
        if step >= STEPS_IN_FLIGHT - 1:
            outcomes.append(group.collect_step())
            ends.append(time.perf_counter())
    return ends, outcomes
