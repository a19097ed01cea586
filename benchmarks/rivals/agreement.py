"""Whether all contestants trained the same model: losses and norms of every step, side by side.

The first loss is of the initial values, the second of one update later, and so on. If gradient,
division, clipping or update differed anywhere, the losses would part after the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.rivals.contest import Contest, Entry
from benchmarks.rivals.turn import Turn

_FIRST = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 1e-2}
# clip_grad_norm_ adds millions of squares in float32; this project adds them in float64.
_NORM = {"float64": 1e-7, "float32": 1e-2, "bfloat16": 3e-2}
_LATER = {"float64": 1e-7, "float32": 1e-3, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Agreement:
    """The largest relative differences of an entry from the first one, over all rounds.

    `first` is of the first step's loss, before any update, `norm` of its gradient's norm before
    clipping, `later` of the losses after updates.
    """

    entry: Entry
    first: float
    norm: float
    later: float

    @property
    def holds(self) -> bool:
        """Whether the differences are no larger than the format's rounding explains."""
        precision = self.entry.task.precision
        return (
            self.first <= _FIRST[precision]
            and self.norm <= _NORM[precision]
            and self.later <= _LATER[precision]
        )


def agreements(contest: Contest) -> list[Agreement]:
    """Compare everybody that was timed with the first of them."""
    finished = contest.finished()
    if not finished:
        return []
    expected = finished[0].turns[0]
    return [_compared(entry, expected) for entry in finished]


def _compared(entry: Entry, expected: Turn) -> Agreement:
    turns = entry.turns
    return Agreement(
        entry,
        first=max(_difference(turn.losses[:1], expected.losses[:1]) for turn in turns),
        norm=max(
            _difference(turn.gradient_norms[:1], expected.gradient_norms[:1]) for turn in turns
        ),
        later=max(_difference(turn.losses[1:], expected.losses[1:]) for turn in turns),
    )


def _difference(losses: Sequence[float], expected: Sequence[float]) -> float:
    pairs = zip(losses, expected, strict=True)
    return max(abs(loss - other) / abs(other) for loss, other in pairs)
