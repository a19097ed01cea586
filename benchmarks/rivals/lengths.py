"""Lengths of sentence pairs like those of WMT'14, English to French, in the order of a corpus.

The paper's corpus has 304M English and 348M French words in 12M pairs (section 3.1). Lengths are
drawn log-normal with these means, French in proportion to English with a spread. The pairs are then
sorted and cut into row groups as `baton prepare` does.
"""

import numpy as np
from numpy.typing import NDArray

MEAN_SOURCE, MEAN_TARGET = 304 / 12, 348 / 12
"""Words of a sentence, its end symbol not counted."""
_SPREAD, _RATIO_SPREAD = 0.6, 0.2
"""Standard deviations of the logarithms: of a length, and of how much longer its translation is."""
_LONGEST = 100
_NUM_ROW_GROUPS = 256

Lengths = NDArray[np.int64]


def row_groups_of_lengths(pairs_per_group: int, seed: int) -> list[Lengths]:
    """Return row groups, short sentences first: each (pairs, 2), source and target words of a pair.

    There are enough of them that the pairs of one have about the same lengths on both sides.
    """
    draw = np.random.default_rng(seed)
    count = _NUM_ROW_GROUPS * pairs_per_group
    exact = _log_normal(draw, MEAN_SOURCE, _SPREAD, count)
    ratio = _log_normal(draw, MEAN_TARGET / MEAN_SOURCE, _RATIO_SPREAD, count)
    source, target = (
        np.clip(np.rint(words), 1, _LONGEST).astype(np.int64) for words in (exact, exact * ratio)
    )
    order = np.lexsort((target, source))
    return np.split(np.stack([source, target], axis=1)[order], _NUM_ROW_GROUPS)


def _log_normal(
    draw: np.random.Generator, mean: float, spread: float, count: int
) -> NDArray[np.float64]:
    return draw.lognormal(np.log(mean) - spread**2 / 2, spread, count)
