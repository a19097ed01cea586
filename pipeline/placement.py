"""Which rank owns which block: any map, and named ones for any number of layers and ranks.

A placement also fixes how the vocabulary is cut into shards, since each shard is a block. It is
plain data, checked against the model once; everything after it trusts it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from model.batching import even_bounds
from model.errors import UserError
from model.network import BlockSpec, ModelConfig, network_blocks_of_shards


class PlacementError(UserError):
    """A placement does not fit the model: blocks missing or unknown, idle ranks, bad shards."""


@dataclass(frozen=True)
class Placement:
    """A rank for every block, by block name, and the vocabulary shards as ranges of target words.

    `num_ranks` counts the ranks of one replica.
    """

    name: str
    num_ranks: int
    rank_of: Mapping[str, int]
    shards: tuple[tuple[int, int], ...]

    def blocks(self, config: ModelConfig) -> tuple[BlockSpec, ...]:
        """Describe the model's blocks, in forward order, with this placement's shards."""
        return network_blocks_of_shards(config, self.shards)

    def check(self, config: ModelConfig) -> None:
        """Raise PlacementError unless every block is on a rank, and every rank has a block."""
        _check_shards(self.shards, config.target_vocabulary_size)
        names = [spec.name for spec in self.blocks(config)]
        _check_blocks(self, names, config.num_layers)
        _check_ranks(self)


NamedPlacement = Callable[[ModelConfig, int, int], Placement]


def named_placement(
    name: str, config: ModelConfig, *, layer_ranks: int | None = None, softmax_ranks: int = 1
) -> Placement:
    """Make a placement by name and check it.

    `layer_ranks` share the layers, one layer a rank when it is None; `softmax_ranks` share the
    words. `single` ignores both. Raises PlacementError.
    """
    if name not in PLACEMENTS:
        known = ", ".join(PLACEMENTS)
        raise PlacementError(f"placement {name!r} is unknown; use one of {known}")
    layer_ranks = config.num_layers if layer_ranks is None else layer_ranks
    placement = PLACEMENTS[name](config, layer_ranks, softmax_ranks)
    placement.check(config)
    return placement


def single(config: ModelConfig, layer_ranks: int, softmax_ranks: int) -> Placement:
    """Put everything on one rank."""
    shards = ((0, config.target_vocabulary_size),)
    names = [spec.name for spec in network_blocks_of_shards(config, shards)]
    return Placement("single", 1, dict.fromkeys(names, 0), shards)


def paper(config: ModelConfig, layer_ranks: int, softmax_ranks: int) -> Placement:
    """Put layers on the first ranks and words on the others (Sutskever et al. 2014, section 3.5).

    A layer rank holds the same layers of encoder and decoder, neighbours together. The embeddings
    are with layer 0; the loss is with the first vocabulary shard.
    """
    _check_counts(config, layer_ranks, softmax_ranks)
    shards = tuple(even_bounds(config.target_vocabulary_size, softmax_ranks))
    rank_of_layer = [
        rank
        for rank, (start, stop) in enumerate(even_bounds(config.num_layers, layer_ranks))
        for _ in range(start, stop)
    ]
    rank_of = {}
    for spec in network_blocks_of_shards(config, shards):
        if spec.kind in ("softmax", "loss"):
            rank_of[spec.name] = layer_ranks + spec.layer
        else:
            rank_of[spec.name] = rank_of_layer[spec.layer]
    return Placement("paper", layer_ranks + softmax_ranks, rank_of, shards)


PLACEMENTS: dict[str, NamedPlacement] = {"single": single, "paper": paper}


def _check_counts(config: ModelConfig, layer_ranks: int, softmax_ranks: int) -> None:
    if not 1 <= layer_ranks <= config.num_layers:
        raise PlacementError(
            f"pipeline.layer_ranks={layer_ranks} does not fit model.num_layers="
            f"{config.num_layers}; use 1 to {config.num_layers}, so that each has a layer"
        )
    if not 1 <= softmax_ranks <= config.target_vocabulary_size:
        raise PlacementError(
            f"pipeline.softmax_ranks={softmax_ranks} does not fit a target vocabulary of "
            f"{config.target_vocabulary_size} words; use 1 to {config.target_vocabulary_size}"
        )


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
