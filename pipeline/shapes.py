"""The shape and number format of every value, known without the value.

Both ends of a message work them out from the chunk's size, so no message needs a header.

Shapes: B sentences and N words of a chunk, E embedding numbers, H cells.
"""

import torch

from model.batching import ChunkSize
from model.network import BlockSpec, ModelConfig
from model.precision import Precision
from pipeline.graph import Value


def value_shape(
    value: Value, spec: BlockSpec, config: ModelConfig, size: ChunkSize
) -> tuple[int, ...]:
    """Return the shape of a value that block `spec` makes for a chunk of the given size."""
    match value.port:
        case "hidden" | "cell":
            return (size.num_sentences, config.hidden_size)
        case "gates":
            return (size.num_tokens, 4 * config.hidden_size)
        case "statistics":
            return (3, size.num_tokens)
        case "log_normalizer":
            return (size.num_tokens,)
        case "input" | "output":
            return (size.num_tokens, _width(spec, config))
    raise AssertionError(f"no block has port {value.port!r}")


def value_dtype(value: Value, precision: Precision) -> torch.dtype:
    """Return the number format: activations and their gradients travel in the compute format.

    Cells, the numbers of the loss, and the gradients of carries are sums of many terms and travel
    in the state format.
    """
    if value.port in ("cell", "statistics", "log_normalizer"):
        return precision.state
    if value.port == "hidden" and value.operation.kind == "I":
        return precision.state
    return precision.compute


def _width(spec: BlockSpec, config: ModelConfig) -> int:
    """Return the size of the vectors at `output` of a block, or at `input` on the way back."""
    embedded = spec.kind == "embedding" or (spec.kind == "projection" and spec.layer == 0)
    return config.embedding_size if embedded else config.hidden_size
