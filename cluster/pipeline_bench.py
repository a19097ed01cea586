"""Measures what a pipeline reaches with emulated devices, beside what the simulator promises.

The ranks are real: actors, schedules, messages of the true sizes. Only the arithmetic is replaced
by waits for its planned time (`pipeline.emulation`), so what is measured is orchestration. One set
of actors runs all placements, one after another.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from cluster.config.sections import ClusterConfig
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
from pipeline.simulation.gradient_exchange import gradient_exchange_s, replica_costs
from pipeline.simulation.simulator import Simulation, simulate

PAPER_SPEEDUP = 3.71
"""6,300 words/s on 8 GPUs against 1,700 on one (Sutskever et al. 2014, section 3.5)."""
PAPER_STEP_S = 4.4
"""One step on one of the paper's GPUs: 128 pairs of 58 words at 1,700 words/s."""
PAPER_MODEL = ModelConfig(source_vocabulary_size=160_000, target_vocabulary_size=80_000)
PAPER_BATCH = BatchShape(num_sentences=128, source_positions=29, target_positions=29)
_STEPS_IN_FLIGHT = 2


@dataclass(frozen=True)
class Case:
    """A placement and its order; with `fused`, I and W of a block are one operation."""

    name: str
    policy: str
    microbatches: int
    time_chunks: int
    fused: bool = False
    note: str = ""


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


@dataclass(frozen=True)
class BenchSettings:
    """What to measure: the costs and the link that schedules count with, and how many steps.

    `time_scale` divides the waits; the figures stand for devices so much faster.
    """

    num_devices: int = 8
    model: ModelConfig = PAPER_MODEL
    batch: BatchShape = PAPER_BATCH
    one_device_step_s: float = PAPER_STEP_S
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
            one_device_step_s=self.one_device_step_s / self.time_scale,
            link=self.link,
        )


@dataclass(frozen=True)
class Prediction:
    """A case with its plan, and its simulation on free links."""

    case: Case
    plan: Plan
    simulation: Simulation


@dataclass(frozen=True)
class Measurement:
    """A case's medians over its steps.

    `step_s` is from the end of a step to the end of the next; `busy_s`, `wait_s` and
    `orchestration_s` share out a rank's time, in the mean over ranks: in operations, blocked on
    other ranks, and everything else. `measured_speedup` is None where nothing was run.
    """

    case: Case
    num_devices: int
    simulated_speedup: float
    measured_speedup: float | None = None
    step_s: float = 0.0
    busy_s: float = 0.0
    wait_s: float = 0.0
    orchestration_s: float = 0.0
    bytes_sent: int = 0

    @property
    def ratio(self) -> float | None:
        """Measured over simulated."""
        if self.measured_speedup is None:
            return None
        return self.measured_speedup / self.simulated_speedup


def predict(case: Case, settings: BenchSettings) -> Prediction:
    """Plan a case with the link of the settings, and simulate it on free links.

    Raises PlacementError where the placement does not fit so many devices.
    """
    costs = settings.costs().fused() if case.fused else settings.costs()
    placement = named_placement(
        case.name,
        settings.model,
        num_ranks=settings.num_devices,
        costs=costs,
        num_microbatches=case.microbatches,
        num_chunks=case.time_chunks,
    )
    plan = Plan(
        settings.model, placement, case.policy, case.microbatches, case.time_chunks, costs=costs
    )
    step = plan.training
    free = replace(costs, link=Link())
    return Prediction(case, plan, simulate(step.schedule, step.graph, placement, free))


def best(predictions: Sequence[Prediction], count: int) -> list[Prediction]:
    """Return the fastest prediction of each of the `count` best placements."""
    ranked = sorted(predictions, key=lambda found: -found.simulation.speedup)
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


def data_parallel(settings: BenchSettings) -> Measurement:
    """Simulate replicas of the whole model, each with its share of the batch; nothing is run.

    The sum of gradients over the link of the settings takes its full time.
    """
    count = settings.num_devices
    costs = replica_costs(settings.costs(), count)
    placement = named_placement("single", settings.model)
    step_s = costs.one_device_s() + gradient_exchange_s(placement, costs, count)[0]
    case = Case("data_parallel", "all_reduce", 1, 1, fused=True, note="simulated only")
    return Measurement(case, count, settings.costs().one_device_s() / step_s)


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
    for step in range(num_steps + _STEPS_IN_FLIGHT - 1):
        if step < num_steps:
            group.submit_step(step + 1, batch, 0.0)
        if step >= _STEPS_IN_FLIGHT - 1:
            outcomes.append(group.collect_step())
            ends.append(time.perf_counter())
    return ends, outcomes
