"""From a configuration to a plan of the run: which placement, cut and order its ranks get.

These may stand in the configuration, in a file by hand, in a saved schedule, or be left to the
planner. The choice is the same whenever it is made again for the same configuration and costs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.config import Config
from cluster.config.placement_file import read_placement_file
from cluster.config.sections import PLACEMENT_NAMES
from cluster.precision_choice import precision_of, with_precision
from model.errors import UserError
from model.network import ModelConfig
from pipeline.costs.arithmetic import arithmetic_costs
from pipeline.costs.file import load_costs
from pipeline.costs.operation_costs import Costs, Link
from pipeline.placements.description import counted
from pipeline.placements.named import named_placement
from pipeline.placements.placement import Placement
from pipeline.placements.rules import placement_from_rules
from pipeline.plan import Plan
from pipeline.planning.planner import best_of, plan
from pipeline.scheduled_plan import ScheduledPlan, plan_from_file
from pipeline.simulation.gradient_exchange import replica_costs


@dataclass(frozen=True)
class _Assumed:
    """What a device is assumed to do where nothing was measured; on CPUs a thread's rate."""

    flop_per_s: float
    link: Link


_ASSUMED: Mapping[str, _Assumed] = {
    "cpu": _Assumed(0.08e12, Link(100e-6, 2e9)),
    "cuda": _Assumed(10e12, Link(20e-6, 10e9)),
    "emulated": _Assumed(10e12, Link(20e-6, 10e9)),
}
_ASSUMED_ORIGIN = "assumed"


def plan_of(config: Config, model: ModelConfig, *, costs: Costs | None = None) -> Plan:
    """Return the plan of a configuration for a model; raises UserError if there can be none.

    `costs` go before those that the configuration names, and are those of the model and the batch.
    """
    config = with_precision(config, None if costs is None else costs.precision)
    precision, seed = config.training.precision, config.seed
    if config.training.schedule is not None:
        made_before = plan_from_file(
            config.training.schedule,
            model,
            precision=precision,
            seed=seed,
            num_replicas=config.pipeline.replicas,
        )
        placement = made_before.placement
        keeps = not (placement.is_whole or placement.recomputes_logits)
        if config.pipeline.recompute_logits and keeps:
            raise UserError(
                f"pipeline.recompute_logits=true, but training.schedule={config.training.schedule} "
                "keeps them; make the schedule again with `baton simulate --save-schedule`, or "
                "leave out one of them"
            )
        return made_before
    if costs is None and config.pipeline.costs is not None:
        loaded = load_costs(config.pipeline.costs)
        costs = loaded.fitted_to(model, config.training.batch_size, precision)
    made = Plan(
        model,
        named_placement("single", model),
        policy=config.pipeline.policy,
        num_microbatches=config.pipeline.microbatches,
        num_chunks=config.pipeline.time_chunks,
        precision=precision,
        seed=seed,
        costs=costs,
        num_replicas=config.pipeline.replicas,
    )
    if config.pipeline.placement == "auto":
        return _planned(config, made)
    return replace(made, placement=placement_of(config, model, costs))


def placement_of(config: Config, model: ModelConfig, costs: Costs | None) -> Placement:
    """Return the placement that a configuration names, which is not `auto`."""
    pipeline = config.pipeline
    if pipeline.placement not in PLACEMENT_NAMES:
        path = Path(pipeline.placement)
        file = read_placement_file(path)
        return placement_from_rules(
            model,
            file.blocks,
            shards=file.shards,
            num_ranks=file.num_ranks,
            name=path.stem,
            recomputes_logits=pipeline.recompute_logits,
        )
    return named_placement(
        pipeline.placement,
        model,
        layer_ranks=pipeline.layer_ranks,
        softmax_ranks=pipeline.softmax_ranks,
        num_ranks=pipeline.ranks,
        costs=None if costs is None else replica_costs(costs, pipeline.replicas),
        num_microbatches=pipeline.microbatches,
        num_chunks=pipeline.time_chunks,
        recomputes_logits=pipeline.recompute_logits,
    )


def layout_words(plan: Plan) -> str:
    """Say in a line how a plan spreads the work, and whether it was chosen without measurements."""
    assumed = plan.costs is not None and plan.costs.origin.startswith(_ASSUMED_ORIGIN)
    doubt = " (from assumed costs; `baton profile` measures)" if assumed else ""
    replicas = "" if plan.num_replicas == 1 else f"{plan.num_replicas} replicas of "
    if plan.num_ranks == 1:
        return f"{replicas}1 rank{doubt}"
    order = "a saved" if isinstance(plan, ScheduledPlan) else plan.policy
    return (
        f"{replicas}{plan.num_ranks} ranks (placement {plan.placement.name}), {order} schedule, "
        f"{counted(plan.num_microbatches, 'microbatch', 'microbatches')}, "
        f"{counted(plan.num_chunks, 'time chunk', 'time chunks')}"
        f"{', logits made twice' if plan.placement.recomputes_logits else ''}{doubt}"
    )


def _planned(config: Config, unplaced: Plan) -> Plan:
    """Let the planner choose replicas, placement, policy and cuts for all devices there are."""
    costs = unplaced.costs or _assumed_costs(config, unplaced.model)
    found = plan(
        unplaced.model,
        config.num_workers,
        costs,
        use_all=True,
        recomputes_logits=config.pipeline.recompute_logits,
    )
    best = best_of(found)
    return replace(
        unplaced,
        costs=costs,
        placement=best.placement,
        policy=best.policy,
        num_microbatches=best.num_microbatches,
        num_chunks=best.num_chunks,
        num_replicas=best.num_replicas,
    )


def _assumed_costs(config: Config, model: ModelConfig) -> Costs:
    """Return the costs that are usual for a device; with a free link replicas would always win."""
    device = config.cluster.device
    assumed = _ASSUMED[device]
    given = config.cluster.threads_per_rank
    # The plan must not depend on how many cores the machine has that makes it.
    threads = given if device == "cpu" and given != "auto" else 1
    costs = arithmetic_costs(
        model,
        config.training.batch_size,
        flop_per_s=assumed.flop_per_s * threads,
        link=assumed.link,
        precision=precision_of(config),
    )
    return replace(costs, origin=f"{_ASSUMED_ORIGIN} of device {device}: {costs.origin}")
