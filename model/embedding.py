"""The embedding of words as a block: a table lookup whose gradient touches the looked-up rows.

Shapes: N words of a chunk, E embedding numbers.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from model.batching import Chunk
from model.block import Block, Tensors
from model.parameter import RowParameter


@dataclass
class EmbeddingSaved:
    """The words (N,) and, after I, the gradient of their embeddings (N, E)."""

    tokens: Tensor
    gradient: Tensor | None = None


class Embedding(Block[EmbeddingSaved]):
    """Words to vectors: port `output` (N, E)."""

    def __init__(self, name: str, weight: RowParameter) -> None:
        super().__init__(name, [weight])
        self.weight = weight

    def forward(
        self, chunk: Chunk, inputs: Tensors, *, training: bool = True
    ) -> tuple[Tensors, EmbeddingSaved]:
        """F: look the chunk's words up."""
        return {"output": self.lookup(chunk.tokens)}, EmbeddingSaved(chunk.tokens)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of word ids of any shape, with one more dimension E."""
        return F.embedding(tokens, self.weight.compute)

    def input_gradient(self, saved: EmbeddingSaved, gradients: Tensors) -> Tensors:
        """I: keep the gradient; words have none."""
        saved.gradient = gradients["output"]
        return {}

    def weight_gradient(self, saved: EmbeddingSaved) -> None:
        """W: add the gradient to the rows of the words."""
        assert saved.gradient is not None, "W before I"
        if saved.tokens.numel():
            self.weight.add_row_gradient(saved.tokens, saved.gradient)
