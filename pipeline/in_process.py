"""All replicas of a pipeline in one process, a thread a rank: for tests and for debuggers."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from model.batching import Batch
from model.loss import LossSum
from model.parameter import Parameter
from model.trainer import StepResult
from pipeline.plan import Plan
from pipeline.stage import Stage, StageResult
from pipeline.transports.in_process import in_process_transports
from pipeline.transports.transport import TransportError

Result = TypeVar("Result")


class InProcessPipeline:
    """All stages of a plan, in the order of workers, joined inside this process."""

    def __init__(self, plan: Plan, device: str = "cpu", timeout_s: float = 60.0) -> None:
        groups = [
            in_process_transports(plan.num_ranks, timeout_s) for _ in range(plan.num_replicas)
        ]
        sums = [
            in_process_transports(plan.num_replicas, timeout_s, member="replica")
            for _ in range(plan.num_ranks)
        ]
        self.plan = plan
        self.stages = [
            Stage(
                plan,
                replica * plan.num_ranks + rank,
                groups[replica][rank],
                device,
                sums[rank][replica],
            )
            for replica in range(plan.num_replicas)
            for rank in range(plan.num_ranks)
        ]

    def train_step(self, batch: Batch, learning_rate: float, clip_norm: float | None) -> StepResult:
        """Make one update on all ranks; raises the first rank's own error."""
        results = self.each(lambda stage: stage.train_step(batch, learning_rate, clip_norm))
        return StepResult(_total_loss(results), results[0].gradient_norm)

    def evaluate(self, batch: Batch) -> LossSum:
        """Return the loss of a batch."""
        return _total_loss(self.each(lambda stage: stage.evaluate(batch)))

    def accumulate(self, batch: Batch) -> LossSum:
        """Add a batch's gradients to those of the parameters; return its loss."""
        self.each(lambda stage: stage.accumulate(batch))
        return sum((stage.take_loss() for stage in self.stages), LossSum())

    def parameters(self, replica: int = 0) -> dict[str, Parameter]:
        """Return all pieces of a replica's parameters by key, in the canonical order."""
        first = replica * self.plan.num_ranks
        stages = self.stages[first : first + self.plan.num_ranks]
        held = {key: p for stage in stages for key, p in stage.parameters().items()}
        return {rows.key: held[rows.key] for rows in self.plan.parameter_rows}

    def whole(
        self, tensor_of: Callable[[Parameter], Tensor], replica: int = 0
    ) -> dict[str, Tensor]:
        """Return a tensor of every whole-model parameter, a replica's pieces put together."""
        wholes: dict[str, Tensor] = {}
        for parameter in self.parameters(replica).values():
            rows, piece = parameter.rows, tensor_of(parameter)
            if rows.name not in wholes:
                wholes[rows.name] = piece.new_empty(rows.shape)
            wholes[rows.name][rows.start : rows.stop] = piece
        return wholes

    def each(self, work: Callable[[Stage], Result]) -> list[Result]:
        """Run something on every stage at once; return the results in the order of workers."""
        with ThreadPoolExecutor(len(self.stages)) as threads:
            futures = [threads.submit(work, stage) for stage in self.stages]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            # The ranks that only lost the others say less than the one that failed first.
            raise min(errors, key=lambda error: isinstance(error, TransportError))
        return [future.result() for future in futures]


def _total_loss(results: list[StageResult]) -> LossSum:
    return sum((result.loss for result in results), LossSum())
