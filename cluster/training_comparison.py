"""What comes out of timing layouts in turns: words a second, ratios, and whether losses agree.

Ratios are taken between turns of the same round, so that a machine that slows down for a while does
so for both.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.plan import Plan

LOSS_TOLERANCE = 1e-3
"""Relative; layouts add in the same order, but products of other sizes round differently."""


@dataclass(frozen=True)
class Turn:
    """The timed steps of one layout in one round.

    `words_per_cpu_s` is for every second of processor time that the ranks took, which other work on
    the machine leaves nearly alone; None where the system does not tell. `rank_busy` is the part of
    the time that each rank was in operations of blocks, `rank_wait` that in which it waited for
    other ranks. `losses` are those of all steps, also of the untimed one. `peak_memory_bytes` is
    the most that each rank has held so far.
    """

    words_per_second: float
    words_per_cpu_s: float | None
    rank_busy: tuple[float, ...]
    rank_wait: tuple[float, ...]
    bytes_sent: int
    losses: tuple[float, ...]
    peak_memory_bytes: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayoutResult:
    """A layout with its turns; medians over rounds.

    `speedups` are the ratios to the training of one rank in the same round. `plans` are several
    where several trainings ran at the same time. `simulated_memory_bytes` is what each rank holds
    of parameters and tensors by the simulator, libraries not counted.
    """

    name: str
    plans: tuple[Plan, ...]
    simulated_speedup: float
    turns: tuple[Turn, ...]
    speedups: tuple[float, ...]
    simulated_memory_bytes: tuple[int, ...] = ()

    @property
    def num_workers(self) -> int:
        """Processes that computed at the same time."""
        return sum(plan.num_workers for plan in self.plans)

    @property
    def words_per_second(self) -> float:
        """Source and target words a second, padding not counted."""
        return statistics.median(turn.words_per_second for turn in self.turns)

    @property
    def words_per_cpu_s(self) -> float | None:
        """Words for every second of processor time."""
        known = [turn.words_per_cpu_s for turn in self.turns if turn.words_per_cpu_s is not None]
        return statistics.median(known) if known else None

    @property
    def speedup(self) -> float:
        """The median ratio to one rank."""
        return statistics.median(self.speedups)

    @property
    def rank_busy(self) -> tuple[float, ...]:
        """The median busy part of each rank's time."""
        return _medians([turn.rank_busy for turn in self.turns])

    @property
    def rank_wait(self) -> tuple[float, ...]:
        """The median part of each rank's time in which it waited for others."""
        return _medians([turn.rank_wait for turn in self.turns])

    @property
    def bytes_sent(self) -> int:
        """What all ranks sent to each other in the last step."""
        return self.turns[-1].bytes_sent

    @property
    def peak_memory_bytes(self) -> tuple[int, ...]:
        """The most that each rank has held."""
        return self.turns[-1].peak_memory_bytes

    @property
    def losses(self) -> tuple[float, ...]:
        """The mean loss of every step, from the first one."""
        return tuple(loss for turn in self.turns for loss in turn.losses)


@dataclass(frozen=True)
class Comparison:
    """The layouts, the first of them one rank, and the ceiling if there are several ranks."""

    layouts: tuple[LayoutResult, ...]
    ceiling: LayoutResult | None

    @property
    def loss_difference(self) -> float:
        """The largest relative difference of a step's loss from that on one rank."""
        measured = [*self.layouts, *([] if self.ceiling is None else [self.ceiling])]
        return max(
            abs(loss - expected) / abs(expected)
            for result in measured
            for loss, expected in zip(result.losses, self.layouts[0].losses, strict=True)
        )

    @property
    def losses_agree(self) -> bool:
        """Whether all layouts made the same steps, up to rounding."""
        return self.loss_difference <= LOSS_TOLERANCE


def _medians(turns: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(statistics.median(rank) for rank in zip(*turns, strict=True))
