"""Which sentence pairs are kept, and why each other one is dropped.

Training pairs must not be empty, long, or of very different lengths; a pair of the validation or
test set is dropped only when a side is empty, since scores must be over the sets as published.
"""

from collections.abc import Sequence
from dataclasses import dataclass

KEPT = 0
EMPTY = 1
TOO_LONG = 2
RATIO = 3
REASONS = {EMPTY: "empty", TOO_LONG: "too_long", RATIO: "ratio"}


@dataclass(frozen=True)
class PairFilter:
    """The bounds of training pairs, in tokens a side without the end symbol; None: no bound."""

    max_length: int | None = None
    max_length_ratio: float | None = None

    def judge_text(self, source: str, target: str) -> int:
        """Judge what needs no encoding, and so protects the encoders from endless lines.

        No kind of vocabulary makes fewer tokens than there are words between white space.
        """
        if not source.strip() or not target.strip():
            return EMPTY
        if self.max_length is None:
            return KEPT
        if _more_words(source, self.max_length) or _more_words(target, self.max_length):
            return TOO_LONG
        return KEPT

    def judge_ids(self, source: Sequence[int], target: Sequence[int]) -> int:
        """Judge an encoded pair: KEPT or the first reason to drop it."""
        shorter, longer = sorted((len(source), len(target)))
        if shorter == 0:
            return EMPTY
        if self.max_length is not None and longer > self.max_length:
            return TOO_LONG
        if self.max_length_ratio is not None and longer > self.max_length_ratio * shorter:
            return RATIO
        return KEPT


def _more_words(text: str, limit: int) -> bool:
    # A text of n characters has at most (n + 1) / 2 words.
    return len(text) >= 2 * limit + 1 and len(text.split(None, limit)) > limit
