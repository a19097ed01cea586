"""The model in torch's own modules and autograd: what the hand-written one must equal."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.batching import Batch
from model.network import ModelConfig
from model.vocabulary import EOS_ID

State = tuple[Tensor, Tensor]


class AutogradSeq2Seq(nn.Module):
    """torch.nn.LSTM, packed sequences and cross_entropy over the documented tensors."""

    def __init__(self, config: ModelConfig, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.tensors = {name: value.clone().requires_grad_(True) for name, value in tensors.items()}

    def loss(self, batch: Batch) -> Tensor:
        """Return the summed negative log-probability in nats."""
        source = F.embedding(batch.source.t(), self.tensors["source_embedding.weight"])
        packed = nn.utils.rnn.pack_padded_sequence(source, batch.source_lengths)
        _, state = self._lstm("encoder", packed, None)
        first = torch.full((batch.num_sentences, 1), EOS_ID)
        read = torch.cat([first, batch.target[:, :-1]], dim=1).t()
        target = F.embedding(read, self.tensors["target_embedding.weight"])
        outputs, _ = self._lstm("decoder", target, state)
        logits = outputs @ self.tensors["softmax.weight"].t() + self.tensors["softmax.bias"]
        positions = torch.arange(batch.target_positions)[:, None]
        mask = positions < batch.target_lengths[None, :]
        losses = F.cross_entropy(logits.permute(1, 2, 0), batch.target, reduction="none")
        return (losses.t() * mask).sum()

    def gradients(self, batch: Batch) -> tuple[float, dict[str, Tensor]]:
        """Return the loss and the gradient of every tensor."""
        loss = self.loss(batch)
        gradients = torch.autograd.grad(loss, list(self.tensors.values()))
        return loss.item(), dict(zip(self.tensors, gradients, strict=True))

    def _lstm(self, network: str, inputs: Any, state: State | None) -> tuple[Tensor, State]:
        """Run torch.nn.LSTM with weights that stay differentiable leaves of ours."""
        config = self.config
        lstm = nn.LSTM(config.embedding_size, config.hidden_size, config.num_layers).double()
        weights = {}
        for layer in range(config.num_layers):
            bias = self.tensors[f"{network}.{layer}.bias"]
            weights[f"weight_ih_l{layer}"] = self.tensors[f"{network}.{layer}.weight_ih"]
            weights[f"weight_hh_l{layer}"] = self.tensors[f"{network}.{layer}.weight_hh"]
            weights[f"bias_ih_l{layer}"] = bias
            weights[f"bias_hh_l{layer}"] = torch.zeros_like(bias)
        outputs: tuple[Tensor, State] = torch.func.functional_call(lstm, weights, (inputs, state))
        return outputs
