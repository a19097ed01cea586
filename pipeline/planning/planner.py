"""Chooses a layout: searches placements, replicas, policies and cuts, and ranks what it found.

No layout wins everywhere, so nothing is assumed of any: the costs decide.
"""

from collections.abc import Sequence
from dataclasses import replace

from model.network import ModelConfig
from pipeline.costs.operation_costs import BatchShape, Costs
from pipeline.placements.placement import PlacementError
from pipeline.planning.candidate import Candidate, best_of
from pipeline.planning.cuts import MICROBATCHES
from pipeline.planning.reasons import why
from pipeline.planning.search import Search
from pipeline.planning.trials import MAX_OPERATIONS, SearchSettings, Trials
from pipeline.schedules.policies import POLICIES, named_policy

__all__ = ["best_of", "plan"]

NUM_CANDIDATES = 12


def plan(
    model: ModelConfig,
    num_devices: int,
    costs: Costs,
    batch: BatchShape | None = None,
    memory_bytes: int | None = None,
    *,
    policies: Sequence[str] = tuple(POLICIES),
    microbatches: Sequence[int] = MICROBATCHES,
    time_chunks: Sequence[int] | None = None,
    use_all: bool = False,
    max_operations: int = MAX_OPERATIONS,
    num_candidates: int = NUM_CANDIDATES,
    recomputes_logits: bool = False,
) -> list[Candidate]:
    """Return the best candidate of each layout, the fastest first; those that do not fit are last.

    Layouts are the named placements with any number of replicas that divides the devices, plain
    data parallelism, and, unless `use_all`, one device, and placements on half of the devices and
    so on where they are faster there. All placements without replicas, data parallelism and one
    device are always returned, of the others the fastest `num_candidates` or so. `batch` replaces
    the shape that the costs are for; it is the whole batch, which replicas share. Raises CostsError
    if the costs are those of another model.
    """
    if num_devices < 1:
        raise PlacementError(f"{num_devices} devices are too few to plan for; use 1 or more")
    costs.check(model)
    costs = replace(costs, model=model, batch=batch or costs.batch)
    for policy in policies:
        named_policy(policy)
    settings = SearchSettings(
        policies,
        microbatches,
        time_chunks,
        use_all,
        max_operations,
        memory_bytes,
        recomputes_logits,
    )
    search = Search(Trials(model, costs, settings))
    search.run(num_devices)
    candidates = [search.best(layout) for layout in search.layouts(num_candidates)]
    explained = [replace(candidate, why=why(candidate, costs)) for candidate in candidates]
    return sorted(explained, key=Candidate.place)
