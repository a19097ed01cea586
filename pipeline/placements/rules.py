"""Placements written by hand: ranks for block names or patterns of them, and the cut of the words.

The map `{"encoder.*": 0, "decoder.*": 1, "*_embedding": 0, "softmax.*": 1, "loss": 1}` is a whole
placement. A block's own name goes before patterns; patterns that disagree are refused.
"""

import fnmatch
import itertools
from collections.abc import Mapping, Sequence

from model.batching import even_bounds
from model.network import ModelConfig, network_blocks_of_shards
from pipeline.placements.placement import Placement, PlacementError


def placement_from_rules(
    config: ModelConfig,
    rules: Mapping[str, int],
    *,
    shards: int | Sequence[int] = 1,
    num_ranks: int | None = None,
    name: str = "by hand",
    recomputes_logits: bool = False,
) -> Placement:
    """Make a placement from ranks by block name or shell pattern, and check it.

    `shards` is a number of even vocabulary shards, or the words of each. `num_ranks` is one more
    than the highest rank when it is None. Raises PlacementError.
    """
    bounds = _bounds(config.target_vocabulary_size, shards)
    names = [spec.name for spec in network_blocks_of_shards(config, bounds)]
    _refuse_idle_rules(rules, names)
    found = {block: _rank(block, rules) for block in names}
    ranks = {block: rank for block, rank in found.items() if rank is not None}
    count = 1 + max(rules.values(), default=0) if num_ranks is None else num_ranks
    placement = Placement(name, count, ranks, bounds, recomputes_logits)
    placement.check(config)
    return placement


def _rank(block: str, rules: Mapping[str, int]) -> int | None:
    if block in rules:
        return rules[block]
    matches = [pattern for pattern in rules if fnmatch.fnmatchcase(block, pattern)]
    ranks = {rules[pattern] for pattern in matches}
    if len(ranks) > 1:
        raise PlacementError(
            f"the patterns {', '.join(map(repr, matches))} put block {block!r} on ranks "
            f"{', '.join(map(str, sorted(ranks)))}; name the block itself, or keep one pattern"
        )
    return ranks.pop() if ranks else None


def _refuse_idle_rules(rules: Mapping[str, int], names: Sequence[str]) -> None:
    for pattern in rules:
        if not any(block == pattern or fnmatch.fnmatchcase(block, pattern) for block in names):
            raise PlacementError(
                f"{pattern!r} in the placement names no block; blocks are {names[0]!r} to "
                f"{names[-1]!r}, for example {names[2]!r}"
            )


def _bounds(num_words: int, shards: int | Sequence[int]) -> tuple[tuple[int, int], ...]:
    if isinstance(shards, int):
        if not 1 <= shards <= num_words:
            raise PlacementError(
                f"{shards} vocabulary shards do not fit {num_words} target words; use 1 to "
                f"{num_words}"
            )
        return tuple(even_bounds(num_words, shards))
    starts = [sum(shards[:index]) for index in range(len(shards) + 1)]
    return tuple(itertools.pairwise(starts))
