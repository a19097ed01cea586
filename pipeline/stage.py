"""One rank's part of the training: its blocks, and the step that they take together.

A step is two things: `accumulate` runs the schedule, and `update` applies the paper's rule with the
norm over all parameters of all ranks. Every rank calls both with the same arguments. Each replica
runs its own share of a batch, and all make the same update, with the sum of their gradients.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.batching import Batch
from model.block import Block
from model.loss import Loss, LossSum
from model.optimizer import NonFiniteGradientError, gradient_scale
from model.parameter import Parameter
from model.process_memory import peak_memory_bytes
from pipeline.batch_chunks import BatchChunks
from pipeline.emulation import make_device
from pipeline.executor import Executor, Timing
from pipeline.gradient_sum import make_gradient_sum
from pipeline.plan import Plan
from pipeline.timeline.recording import RankRecord
from pipeline.transports.transport import SumTransport, Transport


@dataclass(frozen=True)
class StageResult:
    """What a rank has to say about a step.

    `loss` is zero except on the rank of the loss block; the sum over ranks and replicas is the
    batch's loss. `gradient_norm` is that of the whole gradient per sentence before clipping, the
    same on all ranks, and 0 after an evaluation. `busy_s` is the time in operations of blocks,
    `wait_s` that blocked on other ranks, `step_s` all of the step; on CUDA they are the host's.
    `bytes_sent` counts the tensors sent to other ranks. `peak_memory_bytes` is the most that the
    rank's process has held so far, on CUDA of the GPU's memory. `record` is there if it was asked
    for.
    """

    loss: LossSum
    gradient_norm: float
    busy_s: float
    wait_s: float
    step_s: float
    bytes_sent: int
    peak_memory_bytes: int
    record: RankRecord | None = None


@dataclass(frozen=True)
class PreparedBatch:
    """A whole batch, and a replica's share of it, cut into a rank's chunks on its device."""

    whole: Batch
    chunks: BatchChunks


class Stage:
    """The blocks of one worker of a plan, on one device.

    `transport` joins the ranks of its replica; `replicas` joins the workers of the same rank, one a
    replica in their order, and is None where there is one replica only. On any error but
    NonFiniteGradientError, which all ranks raise alike, both are closed, since no rank must wait
    for this one; `join` gives new ones. After any error the gradients are gone, and the parameters
    are as before the step, except where TransportError came while other ranks had finished: then
    go back to a checkpoint.
    """

    def __init__(
        self,
        plan: Plan,
        worker: int,
        transport: Transport,
        device: str = "cpu",
        replicas: SumTransport | None = None,
    ) -> None:
        self.replica, rank = divmod(worker, plan.num_ranks)
        self.plan, self.rank = plan, rank
        made = make_device(plan, device)
        self.blocks: dict[str, Block[Any]] = {
            spec.name: made.build_block(spec) for spec in plan.blocks_of(rank)
        }
        held = {p.rows: p for block in self.blocks.values() for p in block.parameters}
        self._parameters = {rows.key: held[rows] for rows in plan.parameter_rows if rows in held}
        self._executor = Executor(plan, rank, self.blocks, made)
        self._device = device
        self.join(transport, replicas)

    def join(self, transport: Transport, replicas: SumTransport | None = None) -> None:
        """Use these transports from now on."""
        assert (transport.rank, transport.num_ranks) == (self.rank, self.plan.num_ranks)
        assert replicas is None or replicas.rank == self.replica
        self.transport = transport
        self._transports = [transport] if replicas is None else [transport, replicas]
        self._sum = make_gradient_sum(self.plan, self._device, self.blocks, replicas)

    def parameters(self) -> dict[str, Parameter]:
        """Return the pieces of parameters that this rank owns, by key, in the canonical order."""
        return dict(self._parameters)

    def gradients(self) -> dict[str, Tensor]:
        """Return the dense gradients of this replica summed since the last update, by key."""
        return {key: parameter.gradient() for key, parameter in self._parameters.items()}

    def prepare(self, batch: Batch) -> PreparedBatch:
        """Do what a step needs of a batch and can be done beforehand, in any thread."""
        share = batch
        if self.plan.num_replicas > 1:
            share = batch.share(self.replica, self.plan.num_replicas)
        return PreparedBatch(batch, self._executor.cut(share))

    def train_step(
        self,
        batch: Batch | PreparedBatch,
        learning_rate: float,
        clip_norm: float | None,
        *,
        record: bool = False,
    ) -> StageResult:
        """Make one update with the whole batch; each block is summed over replicas beside the rest.

        With `record` the result tells when every operation ran. Raises NonFiniteGradientError, on
        all ranks and before anything is changed, or TransportError.
        """
        start, bytes_before = time.perf_counter(), self._bytes_sent
        prepared = self._prepared(batch)
        timing = self._run_training(prepared, self._complete, record=record)
        norm = self.update(prepared.whole.num_sentences, learning_rate, clip_norm, timing)
        return self._result(norm, timing, start, bytes_before)

    def evaluate(self, batch: Batch | PreparedBatch) -> StageResult:
        """Compute the loss of a batch, without gradients. Raises TransportError."""
        start, bytes_before = time.perf_counter(), self._bytes_sent
        with self._released_on_error():
            chunks = self._prepared(batch).chunks
            timing = self._executor.run(chunks, self.transport, training=False)
        return self._result(0.0, timing, start, bytes_before)

    def accumulate(self, batch: Batch, *, record: bool = False) -> Timing:
        """Run the schedule: add a batch's gradients to those of the parameters.

        Others may follow before `update`, so the sum over replicas waits for that.
        """
        return self._run_training(self._prepared(batch), self._settle, record=record)

    def update(
        self,
        num_sentences: int,
        learning_rate: float,
        clip_norm: float | None,
        timing: Timing | None = None,
    ) -> float:
        """Apply and forget the gradients; return their norm per sentence before clipping.

        `num_sentences` counts those of all replicas. The wait for other ranks is added to `timing`.
        """
        timing = timing or Timing()
        with self._released_on_error():
            start = time.perf_counter()
            self._sum.finish()
            timing.wait_s += time.perf_counter() - start
            norms = self._squared_norms(timing)
            scale = gradient_scale(norms, num_sentences, clip_norm)
            for parameter in self._parameters.values():
                parameter.descend(learning_rate * scale.factor)
        return scale.norm

    def take_loss(self) -> LossSum:
        """Return the loss summed since the last call; zero on a rank without the loss block."""
        loss = self.blocks.get("loss")
        return loss.take() if isinstance(loss, Loss) else LossSum()

    def _run_training(
        self, batch: PreparedBatch, completed: Callable[[str], None], *, record: bool
    ) -> Timing:
        with self._released_on_error():
            self._sum.begin(batch.whole)
            return self._executor.run(
                batch.chunks,
                self.transport,
                training=True,
                record=record,
                completed=completed,
            )

    def _prepared(self, batch: Batch | PreparedBatch) -> PreparedBatch:
        return self.prepare(batch) if isinstance(batch, Batch) else batch

    @property
    def _bytes_sent(self) -> int:
        return sum(transport.bytes_sent for transport in self._transports)

    def _complete(self, block: str) -> None:
        self._settle(block)
        self._sum.start(block)

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
            bytes_sent=self._bytes_sent - bytes_before,
            peak_memory_bytes=peak_memory_bytes(self._device),
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
            self._sum.clear()
            if not isinstance(error, NonFiniteGradientError):
                for transport in self._transports:
                    transport.close()
            raise


def _record(timing: Timing, end_s: float) -> RankRecord | None:
    if timing.operations is None:
        return None
    return RankRecord(tuple(timing.operations), timing.meet_s, timing.met_s, end_s)
