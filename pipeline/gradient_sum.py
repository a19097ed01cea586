"""Sums a rank's gradients over replicas, block by block, while the rank goes on with its step.

The ranks of the same number of all replicas are a group of their own. Dense gradients are summed as
they are. Of an embedding only the touched rows travel: every replica sees the whole batch, so all
of them know beforehand which rows each of them touches, and neither counts nor ids are sent.
"""

import time
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from model.batching import Batch
from model.block import Block
from model.network import Side
from model.parameter import RowParameter
from pipeline.costs.arithmetic import arithmetic_costs
from pipeline.costs.operation_costs import BatchShape
from pipeline.emulation import EMULATED
from pipeline.plan import Plan
from pipeline.simulation.gradient_exchange import block_exchange_s, replica_costs
from pipeline.transports.transport import Arrived, Pending, SumTransport


class GradientSum(Protocol):
    """One rank's sums over replicas; all replicas make the same calls in the same order."""

    def begin(self, batch: Batch) -> None:
        """Hear of a whole batch whose gradients are about to be added to those of the blocks."""

    def start(self, block: str) -> None:
        """Start the sum of a block, to whose gradients nothing more is added before `finish`."""

    def finish(self) -> None:
        """Sum all blocks that were not started, and return when all sums are there.

        Raises TransportError.
        """

    def clear(self) -> None:
        """Forget what was begun or started; if sums were under way, the group is of no more use."""


class OneReplica(GradientSum):
    """There is nothing to sum."""

    def begin(self, batch: Batch) -> None:
        """Nothing to do."""

    def start(self, block: str) -> None:
        """Nothing to do."""

    def finish(self) -> None:
        """Nothing to do."""

    def clear(self) -> None:
        """Nothing to do."""


class ReplicaSum(GradientSum):
    """The sums over replicas of `blocks`, by name in forward order, on the sides of `side_of`.

    A sum is the same on all replicas, bit for bit, and the same whenever it is made again.
    """

    def __init__(
        self,
        blocks: Mapping[str, Block[Any]],
        side_of: Mapping[str, Side],
        transport: SumTransport,
    ) -> None:
        self._blocks, self._side_of = blocks, side_of
        self._transport = transport
        self._batches: list[Batch] = []
        self._started: dict[str, list[Pending | _RowSum]] = {}

    def begin(self, batch: Batch) -> None:
        """Keep the batch: its words are the rows that get gradients."""
        self._batches.append(batch)

    def start(self, block: str) -> None:
        """Start to sum the gradients of a block's parameters."""
        self._started[block] = [
            self._row_sum(block, parameter)
            if isinstance(parameter, RowParameter)
            else self._transport.start_all_reduce(parameter.gradient_to_sum())
            for parameter in self._blocks[block].parameters
        ]

    def finish(self) -> None:
        """Sum the blocks that were not started, and wait for all."""
        _start_rest(self, self._blocks, self._started)
        for sums in self._started.values():
            for started in sums:
                started.wait()
        self._transport.flush()
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._batches.clear()
        self._started.clear()

    def _row_sum(self, block: str, parameter: RowParameter) -> "_RowSum":
        rows = [
            self._touched_rows(replica, self._side_of[block])
            for replica in range(self._transport.num_ranks)
        ]
        return _RowSum(parameter, rows, self._transport, tag=len(self._started))

    def _touched_rows(self, replica: int, side: Side) -> Tensor:
        """Return the words that a replica's embedding looked up on a side, each once, in order."""
        shares = [batch.share(replica, self._transport.num_ranks) for batch in self._batches]
        chunks = [
            share.source_chunk(0, share.source_positions)
            if side == "source"
            else share.target_chunk(0, share.target_positions)
            for share in shares
        ]
        # Of no batches there are no words either.
        none = torch.empty(0, dtype=torch.int64)
        tokens = torch.cat([none, *(chunk.tokens.flatten() for chunk in chunks)])
        rows: Tensor = torch.unique(tokens)
        return rows


class _RowSum:
    """The sum of an embedding's gradient: `rows[r]` are the rows that replica r touched."""

    def __init__(
        self, parameter: RowParameter, rows: list[Tensor], transport: SumTransport, tag: int
    ) -> None:
        self._parameter = parameter
        own_rows, own = parameter.row_gradients()
        assert len(own_rows) == len(rows[transport.rank]), "other rows than those of the batch"
        self._rows = [ids.to(own.device) for ids in rows]
        self._parts: list[Pending] = []
        for replica, ids in enumerate(rows):
            if replica == transport.rank:
                self._parts.append(Arrived(own))
            else:
                transport.send(own, replica, tag)
                shape = (len(ids), own.shape[1])
                self._parts.append(transport.receive(shape, own.dtype, replica, tag))

    def wait(self) -> None:
        """Give the parameter the sum of all replicas' rows, added in the order of replicas."""
        parts = [part.wait() for part in self._parts]
        self._parameter.set_row_gradients(list(zip(self._rows, parts, strict=True)))


class EmulatedSum(GradientSum):
    """Takes the time that the sums would take on emulated devices, which have no parameters.

    Each rank has a link for its sums, at the plan's costs; a sum begins when its block is complete
    and the one before it has ended. The replicas really wait for each other once a step.
    """

    def __init__(
        self,
        plan: Plan,
        blocks: Iterable[str],
        transport: SumTransport,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._costs = plan.costs or arithmetic_costs(plan.model, precision=plan.precision)
        specs = {spec.name: spec for spec in plan.blocks}
        # The loss has no gradient.
        self._specs = {name: specs[name] for name in blocks if specs[name].kind != "loss"}
        self._transport = transport
        self._now, self._sleep = now, sleep
        self._started: set[str] = set()
        self._free_at = 0.0

    def begin(self, batch: Batch) -> None:
        """Take the batch's shape."""
        shape = BatchShape(batch.num_sentences, batch.source_positions, batch.target_positions)
        self._costs = replace(self._costs, batch=shape)

    def start(self, block: str) -> None:
        """Send the block's gradient over the link as soon as that is free."""
        num_replicas = self._transport.num_ranks
        costs = replica_costs(self._costs, num_replicas)
        seconds = block_exchange_s(self._specs[block], costs, num_replicas)
        self._free_at = max(self._free_at, self._now()) + seconds
        self._started.add(block)

    def finish(self) -> None:
        """Wait for the other replicas, and until the link is free."""
        _start_rest(self, self._specs, self._started)
        self._transport.start_all_reduce(torch.zeros(1)).wait()
        while (left_s := self._free_at - self._now()) > 0:
            self._sleep(left_s)
        self.clear()

    def clear(self) -> None:
        """Let the link be free."""
        self._started.clear()
        self._free_at = 0.0


def _start_rest(gradient_sum: GradientSum, blocks: Iterable[str], started: Container[str]) -> None:
    """Start the sums of the blocks that were not started, in the same order on all replicas."""
    for block in blocks:
        if block not in started:
            gradient_sum.start(block)


def make_gradient_sum(
    plan: Plan, device: str, blocks: Mapping[str, Block[Any]], transport: SumTransport | None
) -> GradientSum:
    """Return what sums the gradients of a rank's blocks over the replicas of a plan.

    `transport` joins the ranks of this number of all replicas; None if there is one replica only.
    """
    if plan.num_replicas == 1:
        return OneReplica()
    assert transport is not None, "replicas need a transport among themselves"
    assert transport.num_ranks == plan.num_replicas
    if device == EMULATED:
        return EmulatedSum(plan, blocks, transport)
    return ReplicaSum(blocks, {spec.name: spec.side for spec in plan.blocks}, transport)
