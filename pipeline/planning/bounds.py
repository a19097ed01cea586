"""What a placement cannot do better than, whatever the order: found without simulating anything."""

from model.precision import Precision
from pipeline.costs.operation_costs import Costs
from pipeline.placements.placement import Placement
from pipeline.simulation.gradient_exchange import block_exchange_s
from pipeline.simulation.memory import parameter_bytes


def shortest_step_s(placement: Placement, costs: Costs, num_replicas: int) -> float:
    """Return seconds that no order can go below; `costs` are those of one replica.

    A rank needs the time of its operations. The last of them completes a gradient, whose sum over
    replicas comes after it; and sums go one after another, the first behind some block's work.
    """
    work_s, sums_s = [0.0] * placement.num_ranks, [0.0] * placement.num_ranks
    least: list[tuple[float, float]] = [(float("inf"), float("inf"))] * placement.num_ranks
    for spec in placement.blocks(costs.model):
        if spec.kind == "loss":
            continue
        rank, seconds = placement.rank_of[spec.name], costs.whole_block_s(spec)
        sum_s = block_exchange_s(spec, costs, num_replicas)
        work_s[rank] += seconds
        sums_s[rank] += sum_s
        least[rank] = min(least[rank][0], seconds), min(least[rank][1], sum_s)
    return max(
        max(work + last_sum, sums + first_work)
        for work, sums, (first_work, last_sum) in zip(work_s, sums_s, least, strict=True)
        if first_work < float("inf")
    )


def parameters_exceed(placement: Placement, costs: Costs, memory_bytes: int | None) -> bool:
    """Whether parameters and gradients alone are more than some device may hold."""
    held = [0] * placement.num_ranks
    for spec in placement.blocks(costs.model):
        precision = Precision(costs.precision)
        held[placement.rank_of[spec.name]] += parameter_bytes(spec, costs.model, precision)
    return memory_bytes is not None and max(held) > memory_bytes
