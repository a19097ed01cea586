"""Where a step of this project goes: seconds of each kind of block and operation, and the update.

One rank owns the whole model and runs the batch uncut, with both cores, and writes down when every
operation ran. Its softmax makes F, I and W together, some rows at a time, so they are one share.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.rivals.processes import Place
from benchmarks.rivals.task import Task, forward_operations
from model.batching import Batch
from pipeline.in_process import InProcessPipeline
from pipeline.placements.named import named_placement
from pipeline.plan import Plan
from pipeline.stage import StageResult


@dataclass(frozen=True)
class Share:
    """Seconds of all steps, and how many floating-point operations they did, 0 for lookups.

    `operation` is F, I, W or several of them that ran as one.
    """

    kind: str
    operation: str
    seconds: float
    operations: float


def shares_turn(place: Place, task: Task, batches: Sequence[Batch]) -> list[Share]:
    """Make a step of every batch; return the shares of all but the first, in the order of a step.

    What is in none (cutting the batch, gaps between operations) is the share `rest`.
    """
    plan = Plan(
        task.model,
        named_placement("single", task.model),
        policy="fill_drain",
        precision=task.precision,
        seed=task.seed,
    )
    (stage,) = InProcessPipeline(plan).stages
    seconds = defaultdict[tuple[str, str], float](float)
    for number, batch in enumerate(batches):
        result = stage.train_step(batch, task.learning_rate, task.clip_norm, record=True)
        if number > 0:
            for name, taken in _seconds(plan, result).items():
                seconds[name] += taken
    work = defaultdict[str, float](float)
    for batch in batches[1:]:
        for kind, operations in forward_operations(task.model, batch).items():
            work[kind] += operations
    return [
        Share(*name, taken, len(name[1]) * work[name[0]])
        for name, taken in sorted(seconds.items(), key=_place)
    ]


def _seconds(plan: Plan, result: StageResult) -> dict[tuple[str, str], float]:
    record = result.record
    assert record is not None
    kinds = {spec.name: spec.kind for spec in plan.blocks}
    seconds = defaultdict[tuple[str, str], float](float)
    for done in record.operations:
        operation = done.operation
        kind = kinds[operation.block]
        name = (kind, "FIW" if kind == "softmax" else operation.kind)
        seconds[name] += done.end_s - done.start_s
    seconds["norm", ""] = record.meet_s - record.operations[-1].end_s
    seconds["update", ""] = record.end_s - record.met_s
    seconds["rest", ""] = result.step_s - sum(seconds.values())
    return seconds


def _place(item: tuple[tuple[str, str], float]) -> tuple[int, int]:
    kind, operation = item[0]
    kinds = "embedding", "projection", "recurrence", "softmax", "loss", "norm", "update", "rest"
    return kinds.index(kind), "FIW".find(operation)
