"""The model and trainer that one would write by hand: nn.LSTM, nn.Linear and cross_entropy.

Source lengths of a batch differ, and the decoder must start from the states at each sentence's end
in every layer. nn.LSTM gives the states of all layers for the last position only, so there are two
ways, and both are measured:

- `packed`: both sides as packed sequences, which the CPU runs step by step;
- `padded`: the encoder reads sentences of one length at a time, without padding, and the decoder
  reads the padded target, both in one call of the library's fused LSTM each. Training batches hold
  few source lengths, mostly one.

Either way the softmax sees real words only. Padding on the left is not a way: with biases, a state
that reads zeros does not stay zero.

Shapes: B sentences, S source positions, T target positions, L layers, H cells, N target words.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from benchmarks.rivals.parameters import fill, fill_lstm, without_values
from benchmarks.rivals.processes import Place
from benchmarks.rivals.task import Task
from benchmarks.rivals.turn import ProcessTurn, Step, run_steps
from model.batching import Batch
from model.precision import Precision
from model.vocabulary import EOS_ID

Layout = Literal["packed", "padded"]
State = tuple[Tensor, Tensor]


class Encoder(nn.Module):
    """Source words (B, S), longest first, to the last states of all layers, each (L, B, H)."""

    def __init__(self, task: Task, layout: Layout) -> None:
        super().__init__()
        model = task.model
        self.layout = layout
        self.embedding = nn.Embedding(model.source_vocabulary_size, model.embedding_size)
        self.lstm = nn.LSTM(model.embedding_size, model.hidden_size, model.num_layers)

    def fill(self, task: Task) -> None:
        """Set the initial values."""
        fill(self.embedding.weight, "source_embedding.weight", task)
        fill_lstm(self.lstm, "encoder", range(task.model.num_layers), task)

    def forward(self, source: Tensor, lengths: Tensor) -> State:
        """Read all sentences to their ends."""
        if self.layout == "packed":
            packed = pack_padded_sequence(self.embedding(source.t()), lengths)
            state: State = self.lstm(packed)[1]
            return state
        ends: list[State] = []
        distinct, counts = torch.unique_consecutive(lengths, return_counts=True)
        start = 0
        for length, count in zip(distinct.tolist(), counts.tolist(), strict=True):
            words = source[start : start + count, :length].t()
            ends.append(self.lstm(self.embedding(words))[1])
            start += count
        if len(ends) == 1:
            return ends[0]
        hidden, cell = (torch.cat(parts, dim=1) for parts in zip(*ends, strict=True))
        return hidden, cell


def run_decoder(
    lstm: nn.LSTM, inputs: Tensor, lengths: Tensor, start: State, layout: Layout
) -> Tensor:
    """Run decoder layers over inputs (T, B, H) from their states; return (T, B, H).

    Packed, outputs behind a sentence's end are zero; padded, they mean nothing.
    """
    if layout == "padded":
        outputs: Tensor = lstm(inputs, start)[0]
        return outputs
    packed = pack_padded_sequence(inputs, lengths, enforce_sorted=False)
    result: PackedSequence = lstm(packed, start)[0]
    padded, _ = nn.utils.rnn.pad_packed_sequence(result, total_length=inputs.shape[0])
    return padded


def summed_loss(softmax: nn.Linear, outputs: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
    """Return the negative log-probability, summed, of target (B, T) from outputs (T, B, H)."""
    real = torch.arange(target.shape[1])[:, None] < lengths[None, :]
    logits = softmax(outputs[real])
    return F.cross_entropy(logits, target.t()[real], reduction="sum")


def read_words(target: Tensor) -> Tensor:
    """Return what the decoder reads (B, T): the end symbol, then each word that it predicted."""
    return torch.cat([torch.full((len(target), 1), EOS_ID), target[:, :-1]], dim=1)


class PlainSeq2Seq(nn.Module):
    """The whole network."""

    def __init__(self, task: Task, layout: Layout) -> None:
        super().__init__()
        model = task.model
        self.layout = layout
        self.encoder = Encoder(task, layout)
        self.embedding = nn.Embedding(model.target_vocabulary_size, model.embedding_size)
        self.decoder = nn.LSTM(model.embedding_size, model.hidden_size, model.num_layers)
        self.softmax = nn.Linear(model.hidden_size, model.target_vocabulary_size)

    def fill(self, task: Task) -> None:
        """Set the initial values."""
        self.encoder.fill(task)
        fill(self.embedding.weight, "target_embedding.weight", task)
        fill_lstm(self.decoder, "decoder", range(task.model.num_layers), task)
        fill(self.softmax.weight, "softmax.weight", task)
        fill(self.softmax.bias, "softmax.bias", task)

    def forward(
        self, source: Tensor, source_lengths: Tensor, target: Tensor, target_lengths: Tensor
    ) -> Tensor:
        """Return the summed loss of a batch."""
        start = self.encoder(source, source_lengths)
        inputs = self.embedding(read_words(target).t())
        outputs = run_decoder(self.decoder, inputs, target_lengths, start, self.layout)
        return summed_loss(self.softmax, outputs, target, target_lengths)


def autocast(task: Task) -> torch.autocast:
    """Return the context of the forward pass: bfloat16 where the task says so."""
    compute = Precision(task.precision).compute
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute == torch.bfloat16)


def make_optimizer(parameters: Iterable[nn.Parameter], task: Task) -> torch.optim.SGD:
    """Return plain SGD in the library's fused form."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=task.learning_rate, fused=True)


class PlainTrainer:
    """One process; with `module` a wrapped model whose gradients are averaged over `world` ones."""

    def __init__(self, task: Task, model: PlainSeq2Seq, module: nn.Module, world: int = 1) -> None:
        self._task, self._module, self._world = task, module, world
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = make_optimizer(self._parameters, task)

    def step(self, batch: Batch, num_sentences: int) -> Step:
        """Make one update with a share of `num_sentences` sentences."""
        with autocast(self._task):
            loss = self._module(
                batch.source, batch.source_lengths, batch.target, batch.target_lengths
            )
        (loss * (self._world / num_sentences)).backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, self._task.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return Step(float(loss.detach()), batch.num_target_tokens, float(norm))


def plain_turn(place: Place, task: Task, batches: list[Batch], layout: Layout) -> ProcessTurn:
    """Make a turn in one process."""
    model = without_values(lambda: PlainSeq2Seq(task, layout))
    model.fill(task)
    trainer = PlainTrainer(task, model, model)
    return run_steps(lambda batch: trainer.step(batch, batch.num_sentences), batches)
