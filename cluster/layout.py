"""From a configuration to a plan of the run: which placement, cut and order its ranks get.

These may stand in the configuration, in a file by hand, in a saved schedule, or be left to the
planner. The choice is the same whenever it is made again for the same configuration and costs.
"""

from dataclasses import replace
from pathlib import Path

from cluster.config import Config
from cluster.config.placement_file import read_placement_file
from cluster.config.sections import PLACEMENT_NAMES
from model.network import ModelConfig
from pipeline.costs.arithmetic import arithmetic_costs
from pipeline.costs.file import load_costs
from pipeline.costs.operation_costs import Costs
from pipeline.placements.named import named_placement
from pipeline.placements.placement import Placement
from pipeline.placements.rules import placement_from_rules
from pipeline.plan import Plan
from pipeline.planning.planner import best_of, plan
from pipeline.scheduled_plan import ScheduledPlan, plan_from_file


def plan_of(config: Config, model: ModelConfig, *, costs: Costs | None = None) -> Plan:
    """Return the plan of a configuration for a model; raises UserError if there can be none.

    `costs` go before those that the configuration names.
    """
    precision, seed = config.training.precision, config.seed
    if config.training.schedule is not None:
        return plan_from_file(
            config.training.schedule,
            model,
            precision=precision,
            seed=seed,
            num_replicas=config.pipeline.replicas,
        )
    if costs is None and config.pipeline.costs is not None:
        costs = load_costs(config.pipeline.costs)
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
            model, file.blocks, shards=file.shards, num_ranks=file.num_ranks, name=path.stem
        )
    return named_placement(
        pipeline.placement,
        model,
        layer_ranks=pipeline.layer_ranks,
        softmax_ranks=pipeline.softmax_ranks,
        num_ranks=pipeline.ranks,
        costs=costs,
        num_microbatches=pipeline.microbatches,
        num_chunks=pipeline.time_chunks,
    )


def layout_words(plan: Plan) -> str:
    """Say in a line how a plan spreads the work."""
    replicas = "" if plan.num_replicas == 1 else f"{plan.num_replicas} replicas of "
    if plan.num_ranks == 1:
        return f"{replicas}1 rank"
    order = "a saved" if isinstance(plan, ScheduledPlan) else plan.policy
    return (
        f"{replicas}{plan.num_ranks} ranks (placement {plan.placement.name}), {order} schedule, "
        f"{_counted(plan.num_microbatches, 'microbatch', 'microbatches')}, "
        f"{_counted(plan.num_chunks, 'time chunk', 'time chunks')}"
    )


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _planned(config: Config, unplaced: Plan) -> Plan:
    """Let the planner choose replicas, placement, policy and cuts for all devices there are."""
    costs = unplaced.costs or arithmetic_costs(
        unplaced.model, config.training.batch_size, precision=config.training.precision
    )
    best = best_of(plan(unplaced.model, config.num_workers, costs, use_all=True))
    return replace(
        unplaced,
        placement=best.placement,
        policy=best.policy,
        num_microbatches=best.num_microbatches,
        num_chunks=best.num_chunks,
        num_replicas=best.num_replicas,
    )
