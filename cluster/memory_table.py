"""The most memory of every rank: measured, beside what the memory model says of its tensors."""

from collections.abc import Mapping, Sequence

from pipeline.costs.arithmetic import arithmetic_costs
from pipeline.plan import Plan
from pipeline.simulation.simulator import simulate

GIB = 1 << 30


def memory_by_model(plan: Plan, num_sentences: int, num_positions: int) -> tuple[int, ...]:
    """Return the bytes of parameters and tensors that each worker of a plan holds at most.

    A batch has so many sentences over all replicas, full of so many positions a side.
    """
    costs = arithmetic_costs(
        plan.model, num_sentences, num_positions, num_positions, precision=plan.precision
    )
    step = plan.training
    simulation = simulate(
        step.schedule, step.graph, plan.placement, costs, num_replicas=plan.num_replicas
    )
    return simulation.peak_memory_bytes * plan.num_replicas


def measured_memory(metrics: Mapping[str, float]) -> tuple[int, ...]:
    """Return the peak of each worker out of a run's newest metrics; empty if there are none."""
    peaks: list[int] = []
    while (name := f"memory/rank{len(peaks)}_peak_bytes") in metrics:
        peaks.append(int(metrics[name]))
    return tuple(peaks)


def memory_lines(measured: Sequence[int], told: Sequence[int], num_positions: int) -> list[str]:
    """Lay out both in a short table, a line a rank; nothing where nothing was measured."""
    if not measured:
        return []
    expected = list(told) if len(told) == len(measured) else [0] * len(measured)
    rows = [
        f"  rank {rank:<4} {peak / GIB:>8.2f} {(f'{part / GIB:.2f}' if part else '-'):>8}"
        for rank, (peak, part) in enumerate(zip(measured, expected, strict=True))
    ]
    head = f"  {'GiB':<9} {'measured':>8} {'tensors':>8}"
    return [
        "most memory of each rank's process, and of its tensors by the memory model",
        f"(in batches full of {num_positions} positions a side):",
        head,
        *rows,
    ]
