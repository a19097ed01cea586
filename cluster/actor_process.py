"""The process of a worker's actor: where it runs, what it reserves, and its environment."""

from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config.sections import ClusterConfig
from cluster.resources import Reservation, rank_resources
from cluster.stage_actor import CONCURRENCY, StageActor
from pipeline.plan import Plan

_KEEP_MEMORY = {
    # The C library otherwise gives every large tensor back to the system, and a step pays for new
    # pages again and again.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
}


def create_actor(plan: Plan, worker: int, cluster: ClusterConfig, reservation: Reservation) -> Any:  # noqa: ANN401 - Ray's actor handles have no useful type
    """Start a worker's actor in the place that is reserved for it; returns at once."""
    resources = rank_resources(cluster)
    num_threads = cluster.threads_per_rank
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
                **_KEEP_MEMORY,
            }
        },
    )
    return actor_class.remote(plan, worker, cluster.device, num_threads)
