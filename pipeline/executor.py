"""Runs one rank's program over a batch: gathers inputs, runs blocks, frees and sends values.

It knows no kind of block and no policy: what happens when was decided in the schedule.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.batching import Batch, ChunkSize
from model.block import Block, Tensors
from model.network import BlockSpec, Side
from model.precision import Precision
from pipeline.batch_chunks import BatchChunks
from pipeline.devices import Device
from pipeline.graph import Value
from pipeline.plan import Plan
from pipeline.program import Instruction, Program, Receive, compile_program
from pipeline.shapes import value_dtype, value_shape
from pipeline.timeline.recording import RecordedOperation
from pipeline.transports.transport import Pending, Transport

Form = tuple[tuple[int, ...], torch.dtype]


@dataclass
class Timing:
    """Where a rank's time went: in operations of blocks, and blocked on other ranks.

    `operations` is None unless every single one was to be written down. `meet_s` and `met_s` are
    the clock times at which the rank entered and left the last sum over all ranks.
    """

    busy_s: float = 0.0
    wait_s: float = 0.0
    operations: list[RecordedOperation] | None = None
    meet_s: float = 0.0
    met_s: float = 0.0


class Executor:
    """Runs a rank's part of a plan over its blocks."""

    def __init__(
        self, plan: Plan, rank: int, blocks: Mapping[str, Block[Any]], device: Device
    ) -> None:
        self.plan, self.rank = plan, rank
        self.blocks = blocks
        self.device = device
        self.precision = Precision(plan.precision)
        self.specs: dict[str, BlockSpec] = {spec.name: spec for spec in plan.blocks}
        self._sides: set[Side] = {self.specs[name].side for name in blocks}
        self._programs: dict[bool, Program] = {}
        self._forms: dict[tuple[str, str, str, ChunkSize], Form] = {}

    def cut(self, batch: Batch) -> BatchChunks:
        """Cut a batch into the chunks that this rank's operations work on."""
        plan, device = self.plan, self.device.tensor_device
        return BatchChunks(batch, plan.num_microbatches, plan.num_chunks, device, self._sides)

    def run(
        self,
        chunks: BatchChunks,
        transport: Transport,
        *,
        training: bool,
        record: bool = False,
        completed: Callable[[str], None] = lambda block: None,
    ) -> Timing:
        """Run F of a cut batch and, in training, I and W, which add to the parameters' gradients.

        With `record` the timing lists every operation. `completed` is called with the name of each
        block once nothing more is added to its gradients, always in the same order.
        """
        timing = Timing(operations=[] if record else None)
        return _Run(self, self._program(training), chunks, transport, timing, completed).to_end()

    def form(self, value: Value, chunks: BatchChunks) -> Form:
        """Return shape and number format of a value, worked out once for each size of a chunk."""
        kind, block, _, _ = value.operation
        spec = self.specs[block]
        size = chunks.size(spec.side, value.operation)
        key = block, kind, value.port, size
        if key not in self._forms:
            shape = value_shape(value, spec, self.plan.model, size)
            self._forms[key] = shape, value_dtype(value, self.precision)
        return self._forms[key]

    def _program(self, training: bool) -> Program:
        if training not in self._programs:
            planned = self.plan.training if training else self.plan.evaluation
            self._programs[training] = compile_program(planned, self.plan.placement, self.rank)
        return self._programs[training]


class _Run:
    """One pass through a program; values and saved objects live in it by slot."""

    def __init__(
        self,
        executor: Executor,
        program: Program,
        chunks: BatchChunks,
        transport: Transport,
        timing: Timing,
        completed: Callable[[str], None],
    ) -> None:
        self._executor = executor
        self._program = program
        self._chunks = chunks
        self._transport = transport
        self._values: dict[int, Tensor] = {}
        self._pending: dict[int, Pending] = {}
        self._saved: dict[int, Any] = {}
        self._timing = timing
        self._completed = completed

    def to_end(self) -> Timing:
        self._executor.device.begin_step()
        for instruction in self._program.instructions:
            self._step(instruction)
        assert not self._values, "a value was kept that nobody uses"
        assert not self._saved, "an operation that frees its block's saved object is missing"
        start = time.perf_counter()
        self._transport.flush()
        self._timing.wait_s += time.perf_counter() - start
        return self._timing

    def _step(self, instruction: Instruction) -> None:
        for receive in instruction.posts:
            self._post(receive)
        waited_s = self._await(instruction.awaited) if instruction.awaited else 0.0
        inputs = {port: self._gather(slots) for port, slots in instruction.inputs}
        for slot in instruction.unused:
            del self._values[slot]
        if instruction.sends:
            ports = [port for port, _ in instruction.sends]
            self._executor.device.announce_outputs(ports, self._transport.empty)
        start = time.perf_counter()
        outputs = self._operate(instruction, inputs)
        end = time.perf_counter()
        timing = self._timing
        timing.busy_s += end - start
        if timing.operations is not None:
            timing.operations.append(RecordedOperation(instruction.operation, start, end, waited_s))
        for port, receivers in instruction.sends:
            self._transport.multicast(outputs[port].contiguous(), receivers)
        for port, slot in instruction.kept:
            self._values[slot] = outputs[port]
        if instruction.completes_gradient:
            self._completed(instruction.operation.block)

    def _operate(self, instruction: Instruction, inputs: Tensors) -> Tensors:
        operation, slot = instruction.operation, instruction.saved
        block = self._executor.blocks[operation.block]
        match operation.kind:
            case "F":
                side = self._executor.specs[operation.block].side
                chunk, training = self._chunks.get(side, operation), self._program.training
                outputs, saved = block.forward(chunk, inputs, training=training)
                # The loss has no gradient operations and keeps nothing.
                if training and saved is not None:
                    self._saved[slot] = saved
                return outputs
            case "I":
                return block.input_gradient(self._saved[slot], inputs)
            case "W":
                block.weight_gradient(self._saved.pop(slot))
                return {}

    def _post(self, receive: Receive) -> None:
        shape, dtype = self._executor.form(receive.value, self._chunks)
        self._pending[receive.slot] = self._transport.receive(
            shape, dtype, receive.source, receive.tag
        )

    def _await(self, slots: tuple[int, ...]) -> float:
        """Wait for values of other ranks; return how long it took in seconds."""
        start = time.perf_counter()
        for slot in slots:
            self._values[slot] = self._pending.pop(slot).wait()
        waited_s = time.perf_counter() - start
        self._timing.wait_s += waited_s
        self._executor.device.waited(waited_s)
        return waited_s

    def _gather(self, slots: tuple[int, ...]) -> Tensor:
        """Return what arrives at a port: one tensor, or the sum of several."""
        if len(slots) == 1:
            return self._values[slots[0]]
        return self._executor.device.add([self._values[slot] for slot in slots])
