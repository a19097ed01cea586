"""The process of a worker's actor: where it runs, what it reserves, and its environment."""

from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config.sections import ClusterConfig
from cluster.resources import Reservation, rank_resources
from cluster.stage_actor import CONCURRENCY, StageActor
from model.process_memory import KEEPING_ENVIRONMENT
from model.processor import AUTO
from pipeline.plan import Plan


def create_actor(plan: Plan, worker: int, cluster: ClusterConfig, reservation: Reservation) -> Any:  # noqa: ANN401 - Ray's actor handles have no useful type
    """Start a worker's actor in the place that is reserved for it; returns at once."""
    resources = rank_resources(cluster)
    # Where the rank chooses its threads, on its node, it sets them for all that it calls.
    num_threads = 1 if cluster.threads_per_rank == AUTO else cluster.threads_per_rank
    # Concurrency groups are an option of the class only, and unknown to Ray's own types.
    remote: Any = ray.remote
    actor_class = remote(concurrency_groups=CONCURRENCY)(StageActor).options(
        num_cpus=resources["CPU"],
        num_gpus=resources.get("GPU", 0.0),
        max_restarts=0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            reservation.group, placement_group_bundle_index=reservation.bundles[worker]
        ),
        runtime_env={
            "env_vars": {
                "OMP_NUM_THREADS": str(num_threads),
                "MLFLOW_DISABLE_TELEMETRY": "true",
                **KEEPING_ENVIRONMENT,
            }
        },
    )
    return actor_class.remote(plan, worker, cluster.device)
