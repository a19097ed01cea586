"""One turn of a contestant: its steps on the clock, and what its processes report of them."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from model.batching import Batch
from model.process_memory import peak_memory_bytes


@dataclass(frozen=True)
class Step:
    """A process's part of one step.

    The loss is summed over its target words, in nats; 0 and 0 words where another process has the
    loss. The norm is that of the whole gradient per sentence before clipping.
    """

    loss: float
    num_tokens: int
    gradient_norm: float


@dataclass(frozen=True)
class ProcessTurn:
    """What a process made: all steps, the warm-up first, the seconds of the timed ones, memory.

    `cpu_s` is the processor time of the timed steps, waiting threads that spin counted too, which
    other work on the machine changes less than the clock. `peak_bytes` is the most of memory that
    was resident, pages shared with others counted too.
    """

    steps: tuple[Step, ...]
    step_s: tuple[float, ...]
    cpu_s: float
    peak_bytes: int


@dataclass(frozen=True)
class Turn:
    """All processes of a contestant together; losses are nats a word, of all steps."""

    step_s: tuple[float, ...]
    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]
    cpu_s: float
    peak_bytes: int


def run_steps(step: Callable[[Batch], Step], batches: Sequence[Batch]) -> ProcessTurn:
    """Make a step of every batch, the first untimed."""
    steps: list[Step] = []
    ends: list[float] = []
    spent: list[float] = []
    for batch in batches:
        steps.append(step(batch))
        ends.append(time.perf_counter())
        spent.append(time.process_time())
    seconds = seconds_between(ends)
    return ProcessTurn(tuple(steps), seconds, spent[-1] - spent[0], peak_memory_bytes())


def seconds_between(ends: Sequence[float]) -> tuple[float, ...]:
    """Return how long after the one before each end came."""
    return tuple(end - before for before, end in itertools.pairwise(ends))


def joined(parts: Sequence[ProcessTurn]) -> Turn:
    """Add up the losses and the memory of processes; a step takes as long as the slowest."""
    steps = list(zip(*(part.steps for part in parts), strict=True))
    tokens = [sum(step.num_tokens for step in each) for each in steps]
    totals = [sum(step.loss for step in each) for each in steps]
    return Turn(
        step_s=tuple(max(each) for each in zip(*(part.step_s for part in parts), strict=True)),
        losses=tuple(total / count for total, count in zip(totals, tokens, strict=True)),
        gradient_norms=tuple(each[0].gradient_norm for each in steps),
        cpu_s=sum(part.cpu_s for part in parts),
        peak_bytes=sum(part.peak_bytes for part in parts),
    )
