"""What a rank computes on: builds its blocks there, and adds tensors up there.

A stage sees a device only through this, so that an emulated one can take the place of a real one
(see `pipeline.emulation`).
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from model.block import Block
from model.network import BlockSpec, build_block
from model.precision import Precision
from pipeline.plan import Plan

Empty = Callable[[tuple[int, ...], torch.dtype], Tensor | None]


class Device(Protocol):
    """One rank's device; `tensor_device` is torch's name of where its tensors are."""

    tensor_device: str

    def build_block(self, spec: BlockSpec) -> Block[Any]:
        """Build a described block of the plan's model, with its initial values."""

    def add(self, terms: Sequence[Tensor]) -> Tensor:
        """Return the sum of two or more tensors, which stay as they are."""

    def begin_step(self) -> None:
        """Hear that a step begins."""

    def announce_outputs(self, ports: Sequence[str], empty: Empty) -> None:
        """Hear which outputs of the next operation go to other ranks.

        `empty` returns memory for them if it saves a copy to write them there.
        """

    def waited(self, seconds: float) -> None:
        """Hear that the rank was blocked on other ranks for so long."""


class TorchDevice:
    """A device that torch computes on: `cpu` or `cuda`."""

    def __init__(self, plan: Plan, name: str) -> None:
        self.tensor_device = name
        self._plan = plan
        self._precision = Precision(plan.precision)

    def build_block(self, spec: BlockSpec) -> Block[Any]:
        """Build the block with its parameters."""
        plan = self._plan
        return build_block(
            spec,
            plan.model,
            precision=self._precision,
            device=self.tensor_device,
            seed=plan.seed,
            alone=plan.num_ranks == 1,
        )

    def add(self, terms: Sequence[Tensor]) -> Tensor:
        """Add in the given order, in the state format."""
        total = terms[0].to(self._precision.state, copy=True)
        for term in terms[1:]:
            total += term
        return total.to(terms[0].dtype)

    def begin_step(self) -> None:
        """Nothing to do."""

    def announce_outputs(self, ports: Sequence[str], empty: Empty) -> None:
        """Nothing to do: blocks make their own tensors, and a copy is little beside arithmetic."""

    def waited(self, seconds: float) -> None:
        """Nothing to do."""
