"""What every block can do: the three operations that a step is made of.

A block is the smallest piece of the network that is never cut. Its forward operation (F) keeps what
its other two need in a `saved` object of the block's own; the input gradient (I) is what other
blocks wait for; the weight gradient (W) may run at any later time before the update. Tensors come
and go by port name, so that one caller can run every kind of block.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from torch import Tensor

from model.batching import Chunk
from model.parameter import Parameter

Tensors = dict[str, Tensor]
Saved = TypeVar("Saved")


class Block(ABC, Generic[Saved]):
    """One piece of the network with its parameters; `name` is unique in the model."""

    def __init__(self, name: str, parameters: Sequence[Parameter] = ()) -> None:
        self.name = name
        self.parameters = tuple(parameters)

    @abstractmethod
    def forward(
        self, chunk: Chunk, inputs: Tensors, *, training: bool = True
    ) -> tuple[Tensors, Saved]:
        """F: return the outputs by port, and what I and W will need.

        Without `training`, I and W will not follow, and what is saved is of no use.
        """

    @abstractmethod
    def input_gradient(self, saved: Saved, gradients: Tensors) -> Tensors:
        """I: from the gradients at the output ports, return those at the input ports."""

    @abstractmethod
    def weight_gradient(self, saved: Saved) -> None:
        """W: add this chunk's share to the gradients of the parameters; only after I."""
