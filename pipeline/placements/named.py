"""Placements by name, for any number of layers and ranks.

`single` has one rank. `paper` puts layers on some ranks and words on the others. In `uneven` the
layer ranks take some words too; in `separate` the encoder is on one half of the ranks and the
decoder on the other, in `split` the recurrences on one half and the projections on the other, and
in both all ranks share the words. How many words a rank gets depends on costs.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from model.batching import even_bounds
from model.network import BlockSpec, ModelConfig, network_blocks, network_blocks_of_shards
from pipeline.costs.arithmetic import arithmetic_costs
from pipeline.costs.operation_costs import Costs
from pipeline.placements.placement import Placement, PlacementError
from pipeline.placements.vocabulary_balance import balanced_words, common_level, vocabulary_s


@dataclass(frozen=True)
class PlacementRequest:
    """What a named placement is made for: see `named_placement`."""

    config: ModelConfig
    layer_ranks: int
    softmax_ranks: int
    costs: Costs
    num_microbatches: int
    num_chunks: int
    recomputes_logits: bool

    @property
    def num_ranks(self) -> int:
        """Layer ranks and softmax ranks together."""
        return self.layer_ranks + self.softmax_ranks


NamedPlacement = Callable[[PlacementRequest], Placement]


def named_placement(
    name: str,
    config: ModelConfig,
    *,
    layer_ranks: int | None = None,
    softmax_ranks: int = 1,
    num_ranks: int | None = None,
    costs: Costs | None = None,
    num_microbatches: int = 1,
    num_chunks: int = 1,
    recomputes_logits: bool = False,
) -> Placement:
    """Make a placement by name and check it.

    `layer_ranks` share the layers, one layer a rank when it is None; `softmax_ranks` share the
    words. `num_ranks` gives their sum instead: the named placement cuts it as it is best, or leaves
    `layer_ranks` for the layers if that is given. `single` ignores all three; `separate` and
    `split` look only at the sum. Words are shared by `costs`, which are counts of arithmetic when
    None, and by M and K, which decide how long a rank waits for the decoder's first output; shards
    take longer with `recomputes_logits`. Raises PlacementError.
    """
    if name not in PLACEMENTS:
        known = ", ".join(PLACEMENTS)
        raise PlacementError(f"placement {name!r} is unknown; use one of {known}")
    costs = costs or arithmetic_costs(config)
    costs.check(config)
    words_s = vocabulary_s(costs, recomputes_logits=recomputes_logits)
    cut = _cut(name, config, layer_ranks, softmax_ranks, num_ranks, costs, words_s)
    placement = PLACEMENTS[name](
        PlacementRequest(config, *cut, costs, num_microbatches, num_chunks, recomputes_logits)
    )
    placement = replace(placement, recomputes_logits=recomputes_logits)
    placement.check(config)
    return placement


def single(request: PlacementRequest) -> Placement:
    """Put everything on one rank."""
    shards = ((0, request.config.target_vocabulary_size),)
    names = [spec.name for spec in network_blocks_of_shards(request.config, shards)]
    return Placement("single", 1, dict.fromkeys(names, 0), shards)


def paper(request: PlacementRequest) -> Placement:
    """Put layers on the first ranks and words on the others (Sutskever et al. 2014, section 3.5).

    A layer rank holds the same layers of encoder and decoder, neighbours together. The embeddings
    are with layer 0; the loss is with the first vocabulary shard.
    """
    _check_counts(request, least_softmax_ranks=1)
    layers = _layers_together(request.config, request.layer_ranks)
    even = even_bounds(request.config.target_vocabulary_size, request.softmax_ranks)
    words = [0] * request.layer_ranks + [stop - start for start, stop in even]
    placement = _assemble("paper", request, layers, words)
    return _with_loss_on(placement, request.layer_ranks)


def uneven(request: PlacementRequest) -> Placement:
    """Let the layer ranks of `paper` take words too, so that all ranks end at the same time.

    The softmax ranks have nothing to do before the decoder's first output, so they get fewer words
    than equal work would give them.
    """
    _check_counts(request, least_softmax_ranks=0)
    layers = _layers_together(request.config, request.layer_ranks)
    return _shared_words("uneven", request, layers)


def separate(request: PlacementRequest) -> Placement:
    """Put the encoder on the first half of the ranks, the decoder on the others, words on all."""
    _check_halves("separate", request)
    config, first = request.config, request.num_ranks // 2
    ranks: dict[str, int] = {}
    for network, start, stop in (("encoder", 0, first), ("decoder", first, request.num_ranks)):
        layers = [f"{network}.{layer}" for layer in range(config.num_layers)]
        if stop - start <= config.num_layers:
            ranks |= _spread(layers, start, stop)
        else:
            halves = [f"{name}.{kind}" for name in layers for kind in ("projection", "recurrence")]
            ranks |= _spread(halves, start, stop)
    return _shared_words("separate", request, _by_prefix(config, ranks))


def split(request: PlacementRequest) -> Placement:
    """Put the recurrences on the first half of the ranks, projections on the others, words on all.

    Layer l of encoder and decoder are together unless there are more ranks than layers.
    """
    _check_halves("split", request)
    config, first = request.config, request.num_ranks // 2
    ranks: dict[str, int] = {}
    for kind, start, stop in (("recurrence", 0, first), ("projection", first, request.num_ranks)):
        together = [
            [f"{network}.{layer}.{kind}" for layer in range(config.num_layers)]
            for network in ("encoder", "decoder")
        ]
        if stop - start <= config.num_layers:
            for names in together:
                ranks |= _spread(names, start, stop)
        else:
            ranks |= _spread([*together[0], *together[1]], start, stop)
    return _shared_words("split", request, ranks)


PLACEMENTS: dict[str, NamedPlacement] = {
    "single": single,
    "paper": paper,
    "uneven": uneven,
    "separate": separate,
    "split": split,
}


def _spread(names: Sequence[str], start: int, stop: int) -> dict[str, int]:
    """Cut names into contiguous parts for the ranks of a range; ranks may be left over."""
    num_parts = min(stop - start, len(names))
    return {
        name: start + part
        for part, (first, last) in enumerate(even_bounds(len(names), num_parts))
        for name in names[first:last]
    }


def _layers_together(config: ModelConfig, layer_ranks: int) -> dict[str, int]:
    ranks: dict[str, int] = {}
    for network in ("encoder", "decoder"):
        names = [f"{network}.{layer}" for layer in range(config.num_layers)]
        ranks |= _spread(names, 0, layer_ranks)
    return _by_prefix(config, ranks)


def _by_prefix(config: ModelConfig, ranks: dict[str, int]) -> dict[str, int]:
    """Give blocks the ranks of their layers, where only layers have one."""
    return {
        spec.name: ranks.get(spec.name, ranks.get(spec.name.rpartition(".")[0], -1))
        for spec in _layer_blocks(config)
    }


def _layer_blocks(config: ModelConfig) -> list[BlockSpec]:
    kinds = ("projection", "recurrence")
    return [spec for spec in network_blocks(config) if spec.kind in kinds]


def _layer_loads(
    config: ModelConfig, ranks: dict[str, int], num_ranks: int, costs: Costs, kinds: str = "FIW"
) -> list[float]:
    """Return each rank's seconds of projections and recurrences."""
    loads = [0.0] * num_ranks
    for spec in _layer_blocks(config):
        loads[ranks[spec.name]] += costs.whole_block_s(spec, kinds)
    return loads


def _shared_words(name: str, request: PlacementRequest, ranks: dict[str, int]) -> Placement:
    """Give all ranks words, so that they end at the same time; busy ranks may get none."""
    config, costs = request.config, request.costs
    loads = _layer_loads(config, ranks, request.num_ranks, costs)
    waits = _waits(request, ranks)
    with_waits = [load + wait for load, wait in zip(loads, waits, strict=True)]
    words = balanced_words(with_waits, costs, recomputes_logits=request.recomputes_logits)
    return _assemble(name, request, ranks, words)


def _waits(request: PlacementRequest, ranks: dict[str, int]) -> list[float]:
    """Return each rank's seconds without work before the decoder's first output.

    That comes when the busiest rank has read the first microbatch's source, and one chunk has then
    gone through all layers. Until then a rank has only the source to read.
    """
    config, costs = request.config, request.costs
    source = [0.0] * request.num_ranks
    for spec in _layer_blocks(config):
        if spec.side == "source":
            source[ranks[spec.name]] += costs.whole_block_s(spec, "F")
    first_output = max(source) + sum(source) / request.num_chunks
    return [(first_output - busy) / request.num_microbatches for busy in source]


def _assemble(
    name: str, request: PlacementRequest, layers: dict[str, int], words: Sequence[int]
) -> Placement:
    """Put embeddings with the projections that read them, and the loss with the largest shard."""
    owners = [rank for rank, num in enumerate(words) if num]
    bounds, start = [], 0
    for rank in owners:
        bounds.append((start, start + words[rank]))
        start += words[rank]
    ranks = dict(layers)
    ranks["source_embedding"] = layers["encoder.0.projection"]
    ranks["target_embedding"] = layers["decoder.0.projection"]
    ranks |= {f"softmax.{shard}": rank for shard, rank in enumerate(owners)}
    ranks["loss"] = max(owners, key=lambda rank: (words[rank], rank))
    return Placement(name, request.num_ranks, _in_forward_order(request, ranks), tuple(bounds))


def _in_forward_order(request: PlacementRequest, ranks: dict[str, int]) -> dict[str, int]:
    num_shards = sum(name.startswith("softmax.") for name in ranks)
    return {
        spec.name: ranks[spec.name] for spec in network_blocks(request.config, max(1, num_shards))
    }


def _with_loss_on(placement: Placement, rank: int) -> Placement:
    return replace(placement, rank_of={**placement.rank_of, "loss": rank})


def _cut(
    name: str,
    config: ModelConfig,
    layer_ranks: int | None,
    softmax_ranks: int,
    num_ranks: int | None,
    costs: Costs,
    words_s: float,
) -> tuple[int, int]:
    """Return layer ranks and softmax ranks; `words_s` are the seconds of all words."""
    if num_ranks is None:
        return (config.num_layers if layer_ranks is None else layer_ranks), softmax_ranks
    if num_ranks < 1:
        raise PlacementError(f"{num_ranks} ranks are too few for a placement; use 1 or more")
    if layer_ranks is not None:
        return layer_ranks, num_ranks - layer_ranks
    most = min(config.num_layers, num_ranks - (name == "paper"))
    choices: Iterable[int] = range(1, most + 1)

    def longest_s(layer_ranks: int) -> float:
        ranks = _layers_together(config, layer_ranks)
        loads = _layer_loads(config, ranks, layer_ranks, costs)
        others = num_ranks - layer_ranks
        if name == "paper":
            return max(*loads, words_s / others)
        return max(common_level(loads + [0.0] * others, words_s), *loads)

    # Later layers' ranks wait less for the earlier ones' when there are fewer of them.
    best = min(choices, key=lambda ranks: (longest_s(ranks), ranks), default=1)
    return best, num_ranks - best


def _check_counts(request: PlacementRequest, *, least_softmax_ranks: int) -> None:
    config, num_words = request.config, request.config.target_vocabulary_size
    if not 1 <= request.layer_ranks <= config.num_layers:
        raise PlacementError(
            f"pipeline.layer_ranks={request.layer_ranks} does not fit model.num_layers="
            f"{config.num_layers}; use 1 to {config.num_layers}, so that each has a layer"
        )
    if not least_softmax_ranks <= request.softmax_ranks <= num_words:
        raise PlacementError(
            f"pipeline.softmax_ranks={request.softmax_ranks} does not fit a target vocabulary of "
            f"{num_words} words; use {least_softmax_ranks} to {num_words}"
        )


def _check_halves(name: str, request: PlacementRequest) -> None:
    if request.num_ranks < 2:
        raise PlacementError(
            f"placement {name!r} cannot halve {request.num_ranks} rank; use 2 ranks or more"
        )
