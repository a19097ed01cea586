"""Runs one rank's program over a batch: gathers inputs, runs blocks, frees and sends values.

It knows no kind of block and no policy: what happens when was decided in the schedule.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from model.batching import Batch
from model.block import Block, Tensors
from model.network import BlockSpec
from model.precision import Precision
from pipeline.batch_chunks import BatchChunks
from pipeline.devices import Device
from pipeline.graph import Operation, Value
from pipeline.plan import Plan
from pipeline.program import Instruction, Program, Receive, compile_program
from pipeline.shapes import value_dtype, value_shape
from pipeline.timeline.recording import RecordedOperation
from pipeline.transports.transport import Pending, Transport


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
        self._programs: dict[bool, Program] = {}

    def run(
        self,
        batch: Batch,
        transport: Transport,
        *,
        training: bool,
        record: bool = False,
        completed: Callable[[str], None] = lambda block: None,
    ) -> Timing:
        """Run F of a batch and, in training, I and W, which add to the parameters' gradients.

        With `record` the timing lists every operation. `completed` is called with the name of each
        block once nothing more is added to its gradients, always in the same order.
        """
        device = self.device.tensor_device
        chunks = BatchChunks(batch, self.plan.num_microbatches, self.plan.num_chunks, device)
        timing = Timing(operations=[] if record else None)
        return _Run(self, self._program(training), chunks, transport, timing, completed).to_end()

    def _program(self, training: bool) -> Program:
        if training not in self._programs:
            planned = self.plan.training if training else self.plan.evaluation
            self._programs[training] = compile_program(planned, self.plan.placement, self.rank)
        return self._programs[training]


class _Run:
    """One pass through a program, with the values and saved objects that live during it."""

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
        self._values: dict[Value, Tensor] = {}
        self._pending: dict[Value, Pending] = {}
        self._uses_left = dict(program.num_uses)
        self._saved: dict[tuple[str, int, int], Any] = {}
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
        timing = self._timing
        waited_s = timing.wait_s
        for receive in instruction.post:
            self._post(receive)
        inputs = {
            port: self._gather([self._use(value) for value in producers])
            for port, producers in instruction.inputs.items()
        }
        start = time.perf_counter()
        outputs = self._operate(instruction.operation, inputs)
        end = time.perf_counter()
        timing.busy_s += end - start
        if timing.operations is not None:
            waited_s = timing.wait_s - waited_s
            timing.operations.append(RecordedOperation(instruction.operation, start, end, waited_s))
        for send in instruction.sends:
            tensor = outputs[send.port].contiguous()
            self._transport.send(tensor, send.destination, send.tag)
        for port, tensor in outputs.items():
            value = Value(instruction.operation, port)
            if value in self._uses_left:
                self._values[value] = tensor
        if instruction.completes_gradient:
            self._completed(instruction.operation.block)

    def _operate(self, operation: Operation, inputs: Tensors) -> Tensors:
        block = self._executor.blocks[operation.block]
        key = operation[1:]
        match operation.kind:
            case "F":
                side = self._executor.specs[operation.block].side
                outputs, saved = block.forward(self._chunks.get(side, operation), inputs)
                # The loss has no gradient operations and keeps nothing.
                if self._program.training and saved is not None:
                    self._saved[key] = saved
                return outputs
            case "I":
                return block.input_gradient(self._saved[key], inputs)
            case "W":
                block.weight_gradient(self._saved.pop(key))
                return {}

    def _post(self, receive: Receive) -> None:
        executor, value = self._executor, receive.value
        spec = executor.specs[value.operation.block]
        size = self._chunks.size(spec.side, value.operation)
        self._pending[value] = self._transport.receive(
            value_shape(value, spec, executor.plan.model, *size),
            value_dtype(value, executor.precision),
            receive.source,
            receive.tag,
        )

    def _use(self, value: Value) -> Tensor:
        """Return a value, and forget it with its last use."""
        if value in self._pending:
            start = time.perf_counter()
            self._values[value] = self._pending.pop(value).wait()
            waited_s = time.perf_counter() - start
            self._timing.wait_s += waited_s
            self._executor.device.waited(waited_s)
        self._uses_left[value] -= 1
        return self._values[value] if self._uses_left[value] else self._values.pop(value)

    def _gather(self, terms: list[Tensor]) -> Tensor:
        """Return what arrives at a port: one tensor, or the sum of several."""
        return terms[0] if len(terms) == 1 else self._executor.device.add(terms)
