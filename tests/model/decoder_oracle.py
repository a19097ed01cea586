"""A step of the decoder made of the blocks that are trained: what `model.decoder` must equal."""

import torch
from torch import Tensor
from torch.nn import functional as F

from model.batching import Chunk
from model.seq2seq import DecoderState, Seq2Seq


def decode_step(model: Seq2Seq, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
    """Read a word a sentence (B,); return log-probabilities (B, V) of the next, new states."""
    chunk = Chunk(tokens, None, (len(tokens),), len(tokens))
    below = model.blocks["target_embedding"].forward(chunk, {})[0]["output"]
    hidden, cell = [], []
    for layer in range(model.config.num_layers):
        projection = model.blocks[f"decoder.{layer}.projection"]
        gates, _ = projection.forward(chunk, {"input": below})
        carry = {"hidden": state.hidden[layer], "cell": state.cell[layer]}
        made, _ = model.blocks[f"decoder.{layer}.recurrence"].forward(chunk, gates | carry)
        below = made["output"]
        hidden.append(made["hidden"])
        cell.append(made["cell"])
    weight, bias = (model.parameters()[f"softmax.{name}"].compute for name in ("weight", "bias"))
    logits = F.linear(below, weight, bias).to(model.precision.state)
    return torch.log_softmax(logits, dim=1), DecoderState(torch.stack(hidden), torch.stack(cell))
