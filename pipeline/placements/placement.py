"""Which rank owns which block: any map, checked against the model.

A placement also fixes how the vocabulary is cut into shards, since each shard is a block. It is
plain data, checked against the model once; everything after it trusts it. Named placements are in
`pipeline.placements.named`, those written by hand in `pipeline.placements.rules`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from model.errors import UserError
from model.network import BlockSpec, ModelConfig, network_blocks_of_shards


class PlacementError(UserError):
    """A placement does not fit the model: blocks missing or unknown, idle ranks, bad shards."""


@dataclass(frozen=True)
class Placement:
    """A rank for every block, by block name, and the vocabulary shards as ranges of target words.

    `num_ranks` counts the ranks of one replica. With `recomputes_logits` the shards make their
    logits twice rather than keep the exponentials; one rank that has everything does neither.
    """

    name: str
    num_ranks: int
    rank_of: Mapping[str, int]
    shards: tuple[tuple[int, int], ...]
    recomputes_logits: bool = False

    def blocks(self, config: ModelConfig) -> tuple[BlockSpec, ...]:
        """Describe the model's blocks, in forward order, with this placement's shards."""
        recomputes = self.recomputes_logits and not self.is_whole
        return network_blocks_of_shards(config, self.shards, recomputes=recomputes)

    @property
    def is_whole(self) -> bool:
        """Whether one rank has all words in one shard, so that no logits are kept anyway."""
        return self.num_ranks == len(self.shards) == 1

    def check(self, config: ModelConfig) -> None:
        """Raise PlacementError unless every block is on a rank, and every rank has a block."""
        _check_shards(self.shards, config.target_vocabulary_size)
        names = [spec.name for spec in self.blocks(config)]
        _check_blocks(self, names, config.num_layers)
        _check_ranks(self)


def _check_shards(shards: tuple[tuple[int, int], ...], num_words: int) -> None:
    expected = 0
    for start, stop in shards:
        if start != expected or stop <= start:
            raise PlacementError(
                f"the vocabulary shard [{start}, {stop}) does not follow word {expected}; "
                "shards must be non-empty, in order, without gaps"
            )
        expected = stop
    if expected != num_words:
        raise PlacementError(
            f"the vocabulary shards end at word {expected} of {num_words}; cover all of them"
        )


def _check_blocks(placement: Placement, names: list[str], num_layers: int) -> None:
    missing = [name for name in names if name not in placement.rank_of]
    if missing:
        raise PlacementError(
            f"block {missing[0]!r} is on no rank ({len(missing)} of {len(names)} blocks of a model "
            f"with model.num_layers={num_layers}); give each a rank"
        )
    unknown = sorted(set(placement.rank_of) - set(names))
    if unknown:
        raise PlacementError(
            f"the placement has a rank for {unknown[0]!r}, which is no block of a model with "
            f"model.num_layers={num_layers} and {len(placement.shards)} shards; remove it"
        )


def _check_ranks(placement: Placement) -> None:
    for block, rank in placement.rank_of.items():
        if not 0 <= rank < placement.num_ranks:
            raise PlacementError(
                f"block {block!r} is on rank {rank}; ranks go from 0 to {placement.num_ranks - 1}"
            )
    empty = sorted(set(range(placement.num_ranks)) - set(placement.rank_of.values()))
    if empty:
        raise PlacementError(
            f"rank {empty[0]} of {placement.num_ranks} has no block; use fewer ranks or move "
            "blocks there"
        )
