"""What each rank owns, in a few words, for tables and pictures."""

from collections.abc import Iterator, Sequence

from pipeline.placements.placement import Placement


def describe_rank(placement: Placement, rank: int) -> str:
    """Say what a rank owns, such as `both embeddings, encoder and decoder layer 0`."""
    owned = [block for block, owner in placement.rank_of.items() if owner == rank]
    parts = [*_embedding_words(owned), *_layer_words(owned)]
    num_words = sum(
        stop - start
        for shard, (start, stop) in enumerate(placement.shards)
        if placement.rank_of.get(f"softmax.{shard}") == rank
    )
    if num_words:
        parts.append(f"{num_words:,} words of the softmax")
    if "loss" in owned:
        parts.append("the loss")
    return ", ".join(parts)


def _embedding_words(blocks: Sequence[str]) -> Iterator[str]:
    sides = [block.removesuffix("_embedding") for block in blocks if block.endswith("_embedding")]
    if sides:
        yield "both embeddings" if len(sides) == 2 else f"{sides[0]} embedding"


def _layer_words(blocks: Sequence[str]) -> list[str]:
    """Name layers as shortly as what is owned of them allows."""
    halves: dict[tuple[str, str], set[str]] = {}
    for block in blocks:
        if block.count(".") == 2:
            network, layer, half = block.split(".")
            halves.setdefault((layer, half), set()).add(network)
    whole: dict[tuple[str, str], list[str]] = {}
    for (layer, half), networks in halves.items():
        network = "encoder and decoder" if len(networks) == 2 else next(iter(networks))
        whole.setdefault((network, layer), []).append(half)
    grouped: dict[tuple[str, str], list[str]] = {}
    for (network, layer), kinds in whole.items():
        what = "" if len(kinds) == 2 else f"{kinds[0]} of "
        grouped.setdefault((what, network), []).append(layer)
    return [
        f"{what}{network} {'layer' if len(layers) == 1 else 'layers'} {joined(layers)}"
        for (what, network), layers in grouped.items()
    ]


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return `1 rank` or `2 ranks`; without `many`, an s makes it."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def joined(parts: Sequence[str]) -> str:
    """Return `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
