"""How many words each rank gets, so that ranks with different other work end at the same time."""

from collections.abc import Sequence

from model.network import BlockSpec
from pipeline.costs.operation_costs import Costs


def balanced_words(
    loads_s: Sequence[float], costs: Costs, *, recomputes_logits: bool = False
) -> list[int]:
    """Share the target words among ranks that have the given seconds of other work.

    A rank whose other work is longer than what all would have gets no words.
    """
    num_words = costs.model.target_vocabulary_size
    word_s = _word_s(costs, recomputes_logits)
    if word_s <= 0.0:
        return _rounded([num_words / len(loads_s)] * len(loads_s), num_words)
    level = common_level(loads_s, num_words * word_s)
    return _rounded([max(0.0, level - load) / word_s for load in loads_s], num_words)


def common_level(loads: Sequence[float], amount: float) -> float:
    """Return the level to which an amount fills up the loads, the lowest first."""
    lowest: list[float] = []
    level = 0.0
    for load in sorted(loads):
        if lowest and level <= load:
            break
        lowest.append(load)
        level = (amount + sum(lowest)) / len(lowest)
    return level


def vocabulary_s(costs: Costs, *, recomputes_logits: bool = False) -> float:
    """Return the seconds of all words, without what a shard takes however few it has."""
    return _word_s(costs, recomputes_logits) * costs.model.target_vocabulary_size


def _word_s(costs: Costs, recomputes: bool) -> float:
    """Return the seconds that one more word takes in a step."""

    def shard_s(num_words: int) -> float:
        spec = BlockSpec("", "softmax", "target", 0, (0, num_words), recomputes)
        return costs.whole_block_s(spec)

    # The whole vocabulary, since a difference of two small times would be rounding error.
    num_words = costs.model.target_vocabulary_size
    return (shard_s(num_words) - shard_s(0)) / num_words


def _rounded(shares: Sequence[float], total: int) -> list[int]:
    """Round to whole numbers with the given total: the largest remainders go up."""
    floors = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (floors[i] - shares[i], i))
    left = total - sum(floors)
    for index in range(abs(left)):
        place = by_remainder[index % len(by_remainder)]
        floors[place] += 1 if left > 0 else -1
    return floors
