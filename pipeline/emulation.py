"""A device that takes the planned time for every operation, and does no arithmetic.

With it the real actors, schedules and transports run with tensors of the true sizes, on a machine
without the devices. What a step then takes beyond the simulated one is orchestration. Values hold
zeros; those for other ranks are written anew each time, in the operation's own time, where the
transport wants them. There are no parameters, so the largest model fits.
"""

import ctypes
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from model.batching import Chunk, ChunkSize
from model.block import Block, Tensors
from model.network import BlockSpec
from model.precision import Precision
from pipeline.costs.arithmetic import arithmetic_costs
from pipeline.devices import Device, Empty, TorchDevice
from pipeline.graph import Kind, Operation, Value
from pipeline.plan import Plan
from pipeline.shapes import value_dtype, value_shape

EMULATED = "emulated"

_PR_SET_TIMERSLACK = 29
_LONGEST_OVERSLEEP_S = 2e-4
"""Sleeps that end later than this were late because others had the core."""


def make_device(plan: Plan, name: str) -> Device:
    """Return a rank's device: `cpu`, `cuda`, or `emulated` at the plan's costs."""
    return EmulatedDevice(plan) if name == EMULATED else TorchDevice(plan, name)


class DeviceClock:
    """Says when a device that does one operation at a time has done the next.

    A sleep ends later than it should, which a device would not. So the rank sleeps less, by as much
    as sleeps were late before, and spins for what is left. Where it is late all the same it gets
    that back at its next operation, unless it has waited for other ranks meanwhile, so lateness
    does not add up. Time that the rank itself takes between operations is not given back.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._now, self._sleep = now, sleep
        self._late_s = 0.0
        self._oversleep_s = 0.0

    def begin_step(self) -> None:
        """Forget what happened before."""
        self._late_s = 0.0

    def waited(self, seconds: float) -> None:
        """Take back the lateness that a wait for other ranks has hidden."""
        self._late_s = max(0.0, self._late_s - seconds)

    def now(self) -> float:
        """Return the clock's time in seconds."""
        return self._now()

    def spend(self, seconds: float, start: float | None = None) -> None:
        """Return when an operation has ended that began at `start`, by default now.

        Work that took the rank longer than the operation takes is not given back.
        """
        now = self._now()
        end = (now if start is None else start) - self._late_s + seconds
        if now >= end:
            self._late_s = min(self._late_s, now - end)
            return
        wake = end - self._oversleep_s
        late_s = 0.0
        if wake > now:
            self._sleep(wake - now)
            late_s = min(self._now() - wake, _LONGEST_OVERSLEEP_S)
        # Without a sleep the estimate falls, so that a later operation sleeps again.
        self._oversleep_s += (late_s - self._oversleep_s) / 8
        while (now := self._now()) < end:
            pass
        self._late_s = now - end


class EmulatedDevice:
    """A device at the costs of a plan, or at counts of arithmetic where the plan has none."""

    tensor_device = "cpu"

    def __init__(self, plan: Plan, clock: DeviceClock | None = None) -> None:
        self._plan = plan
        self._precision = Precision(plan.precision)
        self._costs = plan.costs or arithmetic_costs(plan.model, precision=plan.precision)
        self._clock = clock or DeviceClock()
        self._zeros: dict[torch.dtype, Tensor] = {}
        self._sent: Sequence[str] = ()
        self._empty: Empty = _no_memory
        self._work: dict[tuple[Kind, str, ChunkSize], tuple[float, Tensors]] = {}

    def build_block(self, spec: BlockSpec) -> "EmulatedBlock":
        """Build a block that only takes time."""
        return EmulatedBlock(spec, self)

    def add(self, terms: Sequence[Tensor]) -> Tensor:
        """Return one of the terms: all are zero, and costs have no sums."""
        return terms[0]

    def begin_step(self) -> None:
        """Forget what happened before; the step runs in the thread that calls this."""
        _ask_for_exact_sleeps()
        self._clock.begin_step()

    def waited(self, seconds: float) -> None:
        """Tell the clock."""
        self._clock.waited(seconds)

    def announce_outputs(self, ports: Sequence[str], empty: Empty) -> None:
        """Write the values at these ports within the time of the next operation."""
        self._sent, self._empty = ports, empty

    def run(self, kind: Kind, spec: BlockSpec, size: ChunkSize) -> Tensors:
        """Take an operation's time on a chunk; return its values, which hold zeros."""
        start = self._clock.now()
        seconds, values = self._planned(kind, spec, size)
        if self._sent:
            values = values | self._written(values)
            self._sent = ()
        self._clock.spend(seconds, start)
        return values

    def _planned(self, kind: Kind, spec: BlockSpec, size: ChunkSize) -> tuple[float, Tensors]:
        key = kind, spec.name, size
        if key not in self._work:
            values = self._values(kind, spec, size)
            self._work[key] = self._costs.block_s(kind, spec, size), values
        return self._work[key]

    def _written(self, values: Tensors) -> Tensors:
        """Return what is sent, written anew where the transport wants it."""
        written: Tensors = {}
        for port in self._sent:
            memory = self._empty(tuple(values[port].shape), values[port].dtype)
            if memory is not None:
                written[port] = memory.zero_()
        return written

    def _values(self, kind: Kind, spec: BlockSpec, size: ChunkSize) -> Tensors:
        """Return an operation's values: nobody changes them, so all lie in the same zeros."""
        forms: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for port in _ports(kind, spec):
            value = Value(Operation(kind, spec.name, 0, 0), port)
            shape = value_shape(value, spec, self._plan.model, size)
            forms[port] = shape, value_dtype(value, self._precision)
            self._make_room(prod(shape), forms[port][1])
        return {
            port: self._zeros[dtype][: prod(shape)].view(shape)
            for port, (shape, dtype) in forms.items()
        }

    def _make_room(self, num_elements: int, dtype: torch.dtype) -> None:
        if dtype not in self._zeros or len(self._zeros[dtype]) < num_elements:
            self._zeros[dtype] = torch.zeros(num_elements, dtype=dtype)
            self._work.clear()  # else it would keep the smaller zeros


class EmulatedBlock(Block[ChunkSize]):
    """A block without parameters; what it keeps of a chunk is the size."""

    def __init__(self, spec: BlockSpec, device: EmulatedDevice) -> None:
        super().__init__(spec.name)
        self._spec, self._device = spec, device

    def forward(
        self, chunk: Chunk, inputs: Tensors, *, training: bool = True
    ) -> tuple[Tensors, Any]:
        """F: values of the true shapes. The loss keeps nothing, like a real one."""
        outputs = self._device.run("F", self._spec, chunk.size)
        return outputs, None if self._spec.kind == "loss" else chunk.size

    def input_gradient(self, saved: ChunkSize, gradients: Tensors) -> Tensors:
        """I: gradients of the true shapes."""
        return self._device.run("I", self._spec, saved)

    def weight_gradient(self, saved: ChunkSize) -> None:
        """W: only the time."""
        self._device.run("W", self._spec, saved)


def _ports(kind: Kind, spec: BlockSpec) -> tuple[str, ...]:
    """Return the ports at which an operation of a block makes values."""
    if kind == "W":
        return ()
    match spec.kind, kind:
        case "embedding", "F":
            return ("output",)
        case "projection", "F":
            return ("gates",)
        case "recurrence", "F":
            return ("output", "hidden", "cell")
        case "softmax", "F":
            return ("statistics",)
        case "loss", "F":
            return ("log_normalizer",)
        case "recurrence", "I":
            return ("gates", "hidden", "cell")
        case (("projection" | "softmax"), "I"):
            return ("input",)
        case _:
            return ()


def _no_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    return None


@cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _ask_for_exact_sleeps() -> None:
    """Let this thread's sleeps end when they should, where Linux would make them longer.

    It adds 50 microseconds to let several end together, and more where other threads have the core.
    """
    if sys.platform == "linux":
        _c_library().prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
        with suppress(OSError):
            # Allowed to few users. The thread spins for less than a tenth of a millisecond at a
            # time, so others still get the core.
            policy = os.SCHED_RR | os.SCHED_RESET_ON_FORK
            os.sched_setscheduler(0, policy, os.sched_param(1))
