"""One rank's part of the training: its blocks, and the step that they take together.

A step is two things: `accumulate` runs the schedule, and `update` applies the paper's rule with the
norm over all parameters of all ranks. Every rank calls both with the same arguments.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.batching import Batch
from model.block import Block
from model.optimizer import NonFiniteGradientError, gradient_scale
from model.parameter import Parameter
from model.softmax import Loss, LossSum
from pipeline.emulation import make_device
from pipeline.executor import Executor, Timing
from pipeline.plan import Plan
from pipeline.timeline.recording import RankRecord
from pipeline.transports.transport import Transport


@dataclass(frozen=True)
class StageResult:
    """What a rank has to say about a step.

    `loss` is zero except on the rank of the loss block; the sum over ranks is the batch's loss.
    `gradient_norm` is that of all ranks' gradients per sentence before clipping, the same on all of
    them, and 0 after an evaluation. `busy_s` is the time in operations of blocks, `wait_s` that
    blocked on other ranks, `step_s` all of the step; on CUDA they are the host's times.
    `bytes_sent` counts the tensors sent to other ranks. `record` is there if it was asked for.
    """

    loss: LossSum
    gradient_norm: float
    busy_s: float
    wait_s: float
    step_s: float
    bytes_sent: int
    record: RankRecord | None = None


class Stage:
    """The blocks of one rank of a plan, on one device, joined to the others by `transport`.

    A living stage gets a new transport after a failure by assignment. On any error but
    NonFiniteGradientError, which all ranks raise alike, the transport is closed, since no rank must
    wait for this one. After any error the gradients are gone, and the parameters are as before the
    step, except where TransportError came while other ranks had finished: then go back to a
    checkpoint.
    """

    def __init__(self, plan: Plan, rank: int, transport: Transport, device: str = "cpu") -> None:
        assert (transport.rank, transport.num_ranks) == (rank, plan.num_ranks)
        self.plan, self.rank = plan, rank
        self.transport = transport
        made = make_device(plan, device)
        self.blocks: dict[str, Block[Any]] = {
            spec.name: made.build_block(spec) for spec in plan.blocks_of(rank)
        }
        held = {p.rows: p for block in self.blocks.values() for p in block.parameters}
        self._parameters = {rows.key: held[rows] for rows in plan.parameter_rows if rows in held}
        self._executor = Executor(plan, rank, self.blocks, made)

    def parameters(self) -> dict[str, Parameter]:
        """Return the pieces of parameters that this rank owns, by key, in the canonical order."""
        return dict(self._parameters)

    def gradients(self) -> dict[str, Tensor]:
        """Return the dense gradients summed since the last update, by key."""
        return {key: parameter.gradient() for key, parameter in self._parameters.items()}

    def train_step(
        self,
        batch: Batch,
        learning_rate: float,
        clip_norm: float | None,
        *,
        record: bool = False,
    ) -> StageResult:
        """Make one update; with `record` the result tells when every operation ran.

        Raises NonFiniteGradientError, on all ranks and before anything is changed, or
        TransportError.
        """
        start, bytes_before = time.perf_counter(), self.transport.bytes_sent
        timing = self.accumulate(batch, record=record)
        norm = self.update(batch.num_sentences, learning_rate, clip_norm, timing)
        return self._result(norm, timing, start, bytes_before)

    def evaluate(self, batch: Batch) -> StageResult:
        """Compute the loss of a batch, without gradients. Raises TransportError."""
        start, bytes_before = time.perf_counter(), self.transport.bytes_sent
        with self._released_on_error():
            timing = self._executor.run(batch, self.transport, training=False)
        return self._result(0.0, timing, start, bytes_before)

    def accumulate(self, batch: Batch, *, record: bool = False) -> Timing:
        """Run the schedule: add a batch's gradients to those of the parameters."""
        with self._released_on_error():
            return self._executor.run(
                batch, self.transport, training=True, record=record, completed=self._settle
            )

    def update(
        self,
        num_sentences: int,
        learning_rate: float,
        clip_norm: float | None,
        timing: Timing | None = None,
    ) -> float:
        """Apply and forget the gradients; return their norm per sentence before clipping.

        The wait for other ranks is added to `timing`.
        """
        with self._released_on_error():
            norms = self._squared_norms(timing or Timing())
            scale = gradient_scale(norms, num_sentences, clip_norm)
            for parameter in self._parameters.values():
                parameter.descend(learning_rate * scale.factor)
        return scale.norm

    def take_loss(self) -> LossSum:
        """Return the loss summed since the last call; zero on a rank without the loss block."""
        loss = self.blocks.get("loss")
        return loss.take() if isinstance(loss, Loss) else LossSum()

    def _settle(self, block: str) -> None:
        for parameter in self.blocks[block].parameters:
            parameter.settle_gradient()

    def _squared_norms(self, timing: Timing) -> list[float]:
        """Return the squared norms of all pieces of all ranks in the canonical order.

        Each has one owner, and the others add zeros, so every rank gets the same bits.
        """
        norms = [
            self._parameters[rows.key].squared_norm() if rows.key in self._parameters else 0.0
            for rows in self.plan.parameter_rows
        ]
        timing.meet_s = time.perf_counter()
        total = self.transport.all_reduce_sum(torch.tensor(norms, dtype=torch.float64))
        timing.met_s = time.perf_counter()
        timing.wait_s += timing.met_s - timing.meet_s
        summed: list[float] = total.tolist()
        return summed

    def _result(self, norm: float, timing: Timing, start: float, bytes_before: int) -> StageResult:
        loss, end = self.take_loss(), time.perf_counter()
        return StageResult(
            loss=loss,
            gradient_norm=norm,
            busy_s=timing.busy_s,
            wait_s=timing.wait_s,
            step_s=end - start,
            bytes_sent=self.transport.bytes_sent - bytes_before,
            record=_record(timing, end),
        )

    @contextmanager
    def _released_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            for parameter in self._parameters.values():
                parameter.clear_gradient()
            self.take_loss()
            if not isinstance(error, NonFiniteGradientError):
                self.transport.close()
            raise


def _record(timing: Timing, end_s: float) -> RankRecord | None:
    if timing.operations is None:
        return None
    return RankRecord(tuple(timing.operations), timing.meet_s, timing.met_s, end_s)
