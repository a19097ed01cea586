"""torch.distributed.pipelining: two ranks, a stage each, microbatches of sentences.

Rank 0 has both embeddings, the encoder and the lower decoder layers, rank 1 the upper decoder
layers and the softmax; the cut is where the arithmetic is most even. Three tensors cross it: the
outputs of the last lower layer, and the encoder's last states (hidden and cell) of the upper ones.

What the library asks for, and what is done about it:

- A stage sends and receives tensors of one shape only, while training batches differ in length. The
  stage and its schedule are therefore made anew for every batch, with all shapes given, which skips
  the library's trial run of the model; that takes a message each way, beside the step nothing.
- The shape must also be that of all microbatches, so a batch is cut into equal ones, and each is
  padded like the batch; sequences are packed or run by length all the same.
- Integers that later stages need (target words and lengths) are given to the last rank beside the
  pipeline.

Shapes: B sentences, S source positions, T target positions, L layers, H cells, U upper layers.
"""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from benchmarks.rivals.parameters import fill, fill_lstm, without_values
from benchmarks.rivals.plain import (
    Encoder,
    Layout,
    autocast,
    make_optimizer,
    read_words,
    run_decoder,
    summed_loss,
)
from benchmarks.rivals.processes import Place
from benchmarks.rivals.task import Task
from benchmarks.rivals.turn import ProcessTurn, Step, run_steps
from model.batching import Batch
from model.network import ModelConfig
from model.precision import Precision

ScheduleName = Literal["1f1b", "gpipe"]
_SCHEDULES: dict[str, type[PipelineScheduleSingle]] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
_NUM_STAGES = 2


def num_lower_layers(model: ModelConfig) -> int:
    """Return how many decoder layers go to rank 0 so that the busier rank has the least to do.

    Both sides count as equally long. Rank 1 keeps a layer at least, or the states of the encoder
    would have no place to go.
    """
    layer = 4 * (model.embedding_size + model.hidden_size) * model.hidden_size
    softmax = model.hidden_size * model.target_vocabulary_size

    def busier(lower: int) -> int:
        upper = model.num_layers - lower
        return max((model.num_layers + lower) * layer, upper * layer + softmax)

    return min(range(model.num_layers), key=busier)


class LowerStage(nn.Module):
    """Source and target words to (T, B, H), (U, B, H), (U, B, H)."""

    def __init__(self, task: Task, layout: Layout) -> None:
        super().__init__()
        model = task.model
        self.layout, self.compute = layout, Precision(task.precision).compute
        self.num_lower = num_lower_layers(model)
        self.encoder = Encoder(task, layout)
        self.embedding = nn.Embedding(model.target_vocabulary_size, model.embedding_size)
        self.decoder = (
            nn.LSTM(model.embedding_size, model.hidden_size, self.num_lower)
            if self.num_lower
            else None
        )

    def fill(self, task: Task) -> None:
        """Set the initial values."""
        self.encoder.fill(task)
        fill(self.embedding.weight, "target_embedding.weight", task)
        if self.decoder is not None:
            fill_lstm(self.decoder, "decoder", range(self.num_lower), task)

    def forward(
        self, source: Tensor, source_lengths: Tensor, target: Tensor, target_lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run a microbatch: sides are (B, S) and (B, T), lengths (B,)."""
        hidden, cell = self.encoder(source, source_lengths)
        outputs = self.embedding(read_words(target).t())
        lower = self.num_lower
        if self.decoder is not None:
            start = hidden[:lower].contiguous(), cell[:lower].contiguous()
            outputs = run_decoder(self.decoder, outputs, target_lengths, start, self.layout)
        crossing = outputs, hidden[lower:].contiguous(), cell[lower:].contiguous()
        first, second, third = (tensor.to(self.compute) for tensor in crossing)
        return first, second, third


class UpperStage(nn.Module):
    """What crosses the cut to the outputs (T, B, H) of the top layer, and those to the loss."""

    def __init__(self, task: Task, layout: Layout) -> None:
        super().__init__()
        model = task.model
        self.layout = layout
        self.first_layer = num_lower_layers(model)
        num_upper = model.num_layers - self.first_layer
        self.decoder = nn.LSTM(model.hidden_size, model.hidden_size, num_upper)
        self.softmax = nn.Linear(model.hidden_size, model.target_vocabulary_size)

    def fill(self, task: Task) -> None:
        """Set the initial values."""
        fill_lstm(self.decoder, "decoder", range(self.first_layer, task.model.num_layers), task)
        fill(self.softmax.weight, "softmax.weight", task)
        fill(self.softmax.bias, "softmax.bias", task)

    def forward(self, below: Tensor, hidden: Tensor, cell: Tensor, lengths: Tensor) -> Tensor:
        """Run a microbatch."""
        return run_decoder(self.decoder, below, lengths, (hidden, cell), self.layout)


class _PipelineTrainer:
    """One rank of two."""

    def __init__(
        self, place: Place, task: Task, layout: Layout, schedule: ScheduleName, microbatches: int
    ) -> None:
        self._rank, self._task, self._microbatches = place.index, task, microbatches
        self._schedule = schedule
        kind = LowerStage if place.index == 0 else UpperStage
        self._module: LowerStage | UpperStage = without_values(lambda: kind(task, layout))
        self._module.fill(task)
        self._parameters = [p for p in self._module.parameters() if p.requires_grad]
        self._optimizer = make_optimizer(self._parameters, task)

    def step(self, batch: Batch) -> Step:
        """Make one update."""
        num_sentences = batch.num_sentences
        losses: list[Tensor] = []
        with autocast(self._task):
            self._run(batch, losses)
        norm = self._whole_norm() / num_sentences
        clip = self._task.clip_norm
        factor = min(1.0, clip / norm) / num_sentences
        torch._foreach_mul_([p.grad for p in self._parameters if p.grad is not None], factor)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._rank == 0:
            return Step(0.0, 0, norm)
        loss = float(torch.stack(losses).detach().sum())
        return Step(loss, batch.num_target_tokens, norm)

    def _run(self, batch: Batch, losses: list[Tensor]) -> None:
        microbatch = batch.num_sentences // self._microbatches
        crossing = self._crossing(microbatch, batch.target_positions)
        words = batch.source, batch.source_lengths, batch.target, batch.target_lengths
        if self._rank == 0:
            first = tuple(
                torch.empty(microbatch, *t.shape[1:], dtype=t.dtype, device="meta") for t in words
            )
            self._schedule_for(first, crossing).step(*words)
            return
        outputs = (self._meta(batch.target_positions, microbatch, self._task.model.hidden_size),)
        both = torch.cat([batch.target, batch.target_lengths[:, None]], dim=1)
        schedule = self._schedule_for(crossing, outputs)
        schedule.step(
            target=both, losses=losses, return_outputs=False, lengths=batch.target_lengths
        )

    def _crossing(self, microbatch: int, positions: int) -> tuple[Tensor, ...]:
        model = self._task.model
        state = model.num_layers - num_lower_layers(model), microbatch, model.hidden_size
        return (
            self._meta(positions, microbatch, model.hidden_size),
            self._meta(*state),
            self._meta(*state),
        )

    def _meta(self, *shape: int) -> Tensor:
        compute = Precision(self._task.precision).compute
        return torch.empty(shape, dtype=compute, device="meta", requires_grad=True)

    def _schedule_for(
        self, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]
    ) -> PipelineScheduleSingle:
        stage = PipelineStage(
            self._module,
            self._rank,
            _NUM_STAGES,
            torch.device("cpu"),
            input_args=inputs,
            output_args=outputs,
        )
        return _SCHEDULES[self._schedule](
            stage, self._microbatches, loss_fn=self._loss, scale_grads=False
        )

    def _loss(self, outputs: Tensor, target_and_lengths: Tensor) -> Tensor:
        assert isinstance(self._module, UpperStage)
        target, lengths = target_and_lengths[:, :-1], target_and_lengths[:, -1]
        return summed_loss(self._module.softmax, outputs, target, lengths)

    def _whole_norm(self) -> float:
        """Return the norm of the gradient of both ranks."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        squared = nn.utils.get_total_norm(gradients).double() ** 2
        dist.all_reduce(squared)
        return float(squared.sqrt())


def pipelining_turn(
    place: Place,
    task: Task,
    batches: list[Batch],
    layout: Layout,
    schedule: ScheduleName,
    microbatches: int,
) -> ProcessTurn:
    """Make a turn as one of two ranks."""
    assert place.num_processes == _NUM_STAGES
    assert task.batch_size % microbatches == 0
    place.join_group()
    turn = run_steps(_PipelineTrainer(place, task, layout, schedule, microbatches).step, batches)
    dist.destroy_process_group()
    return turn
