"""What each rank owns, as pictures show it beside a rank's row."""

from pipeline.placements.description import describe_rank
from pipeline.plan import Plan


def rank_labels(plan: Plan) -> list[str]:
    """Return a label for every rank, such as `both embeddings, encoder and decoder layer 0`."""
    return [describe_rank(plan.placement, rank) for rank in range(plan.num_ranks)]
