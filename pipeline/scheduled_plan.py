"""A plan that runs a saved schedule as it stands, in the place of one that a policy makes."""

from dataclasses import dataclass, field
from pathlib import Path

from model.network import ModelConfig
from pipeline.graph import build_graph
from pipeline.plan import Plan, PlannedStep
from pipeline.schedules.file import load_schedule
from pipeline.schedules.policies import POLICIES
from pipeline.schedules.schedule import Schedule, messages, validate


@dataclass(frozen=True)
class ScheduledPlan(Plan):
    """A plan whose order of a training step is given; an evaluation keeps its forward part."""

    order: Schedule = field(default_factory=lambda: Schedule(()))

    def _planned(self, *, training: bool) -> PlannedStep:
        graph = build_graph(self.blocks, self.num_microbatches, self.num_chunks, training=training)
        schedule = self.order if training else self.order.forward_only()
        validate(schedule, graph, self.placement)
        return PlannedStep(graph, schedule, messages(schedule, graph, self.placement))


def plan_from_file(
    path: Path, model: ModelConfig, *, precision: str, seed: int, num_replicas: int = 1
) -> ScheduledPlan:
    """Read a schedule file and check that it runs a model; every replica follows it.

    Raises PlacementError or ScheduleError.
    """
    saved = load_schedule(path)
    saved.graph(model)
    return ScheduledPlan(
        model,
        saved.placement,
        # Only a name: nothing is ordered by it.
        policy=saved.policy if saved.policy in POLICIES else "wavefront",
        num_microbatches=saved.num_microbatches,
        num_chunks=saved.num_chunks,
        precision=precision,
        seed=seed,
        num_replicas=num_replicas,
        order=saved.schedule,
    )
