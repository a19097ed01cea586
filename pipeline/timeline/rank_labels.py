"""What each rank owns, in a few words, as pictures show it beside a rank's row."""

from collections.abc import Iterator

from model.network import NETWORK_OF_SIDE, BlockSpec
from pipeline.plan import Plan


def rank_labels(plan: Plan) -> list[str]:
    """Return a label for every rank, such as `embeddings, encoder 0, decoder 0`."""
    return [", ".join(dict.fromkeys(_parts(plan.blocks_of(r)))) for r in range(plan.num_ranks)]


def _parts(blocks: tuple[BlockSpec, ...]) -> Iterator[str]:
    """Name a rank's blocks; projection and recurrence of a layer together are just the layer."""
    halves = {(spec.side, spec.layer, spec.kind) for spec in blocks}
    for spec in blocks:
        match spec.kind:
            case "embedding":
                sides = [other.side for other in blocks if other.kind == "embedding"]
                yield "embeddings" if len(sides) > 1 else f"{spec.side} embedding"
            case "projection" | "recurrence":
                other = "recurrence" if spec.kind == "projection" else "projection"
                layer = f"{NETWORK_OF_SIDE[spec.side]} {spec.layer}"
                is_whole = (spec.side, spec.layer, other) in halves
                yield layer if is_whole else f"{layer} {spec.kind}"
            case "softmax":
                yield f"words {spec.words[0]:,}–{spec.words[1] - 1:,}"
            case "loss":
                yield "loss"
