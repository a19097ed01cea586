"""Ray's side of the machines: connecting to a cluster, and reserving a place for every rank.

A rank of a replica is one bundle of a placement group. Ray says where the bundles landed only
afterwards, so ranks are numbered then, in such a way that the ranks of a replica, and neighbours in
the pipeline, share a node. Replicas are not told apart here: `num_ranks` counts those of all.
"""

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.config.sections import ClusterConfig
from model.errors import UserError

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

logger = logging.getLogger(__name__)

CPUS_FOR_DATA = 2
"""Logical CPUs beside those of the ranks, so that Ray Data's tasks can always run."""
RESERVE_TIMEOUT_S = 60.0
_CONNECT_TIMEOUT_S = 5.0
_POLL_S = 0.5
_ENVIRONMENT = {
    # Ray runs its workers at a niceness of 15, so that any other process slows the pipeline down.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A rank that dies is told once, by us; Ray would print a page on it, and one for each peer.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class ClusterError(UserError):
    """The Ray cluster cannot be reached, or has no room for the ranks."""


@contextmanager
def connect(
    cluster: ClusterConfig,
    *,
    num_ranks: int = 0,
    warn: Callable[[str], None] = logger.warning,
) -> Iterator[None]:
    """Be connected to Ray inside the `with` block, with room for so many ranks.

    An existing connection is used and left open. Otherwise `cluster.address`, or RAY_ADDRESS (set
    inside a Ray job), says which cluster; without one Ray is started on this machine, which may
    then have fewer cores than ranks: `warn` gets a line about that. Raises ClusterError when
    nothing answers at the address, or the cluster is too small.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)  # some are read when Ray is imported
    import ray

    if ray.is_initialized():
        check_capacity(cluster, num_ranks)
        yield
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        _start_here(cluster, num_ranks, warn)
    else:
        _connect_to(address)
    try:
        check_capacity(cluster, num_ranks)
        yield
    finally:
        ray.shutdown()


def check_capacity(cluster: ClusterConfig, num_ranks: int) -> None:
    """Raise ClusterError if the cluster as a whole is too small for so many ranks."""
    import ray

    has: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for resource, needed in rank_resources(cluster).items():
        total = needed * num_ranks
        if total > has.get(resource, 0.0):
            raise ClusterError(
                f"{num_ranks} ranks need {total:g} {resource}s and the Ray cluster has "
                f"{has.get(resource, 0.0):g}; {_remedy(resource)}"
            )


def rank_resources(cluster: ClusterConfig) -> dict[str, float]:
    """Return what Ray reserves for one rank, by the names of Ray's resources."""
    resources = {"CPU": cluster.cpus_per_rank}
    if cluster.device == "cuda":
        resources["GPU"] = 1.0
    return resources


def _remedy(resource: str) -> str:
    if resource == "GPU":
        return "use fewer ranks, add nodes with GPUs, or set cluster.device=cpu"
    return (
        "lower pipeline.replicas, pipeline.softmax_ranks, pipeline.layer_ranks or "
        "cluster.cpus_per_rank, or add nodes"
    )


def _start_here(cluster: ClusterConfig, num_ranks: int, warn: Callable[[str], None]) -> None:
    import ray

    cores = os.cpu_count() or 1
    needed = math.ceil(num_ranks * cluster.cpus_per_rank) + CPUS_FOR_DATA
    given = cluster.threads_per_rank
    each = 1 if isinstance(given, str) else given
    if num_ranks * each > cores:
        warn(
            f"{num_ranks} ranks of {each} thread(s) share the {cores} cores of "
            "this machine, so a step takes longer than on as many devices; results are the same "
            "up to rounding"
        )
    try:
        ray.init(
            address="local",
            num_cpus=max(cores, needed),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:
        # Ray raises bare Exceptions here, above all when its processes are not up within 30 s.
        raise ClusterError(
            f"Ray did not start on this machine ({cores} cores, load {os.getloadavg()[0]:.0f}): "
            f"{_reason(error)}; wait until the machine is less busy and start again, or set "
            "cluster.address to a cluster that runs"
        ) from error


def _connect_to(address: str) -> None:
    import ray

    if address.startswith("ray://"):
        raise ClusterError(
            f"cluster.address={address}: training runs on a node of the cluster, not through Ray "
            "Client; send it there with `baton submit CONFIG --address http://HEAD:8265`"
        )
    _check_answers(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"cannot connect to the Ray cluster at {address}: {_reason(error)}; run on one of its "
            "nodes, use `baton submit`, or set cluster.address=local to start Ray here"
        ) from error


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else repr(error)


def _check_answers(address: str) -> None:
    """Find out fast that nothing listens; Ray itself tries for long and may end the process."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error}); start it with `ray start --head`, "
            "correct cluster.address or RAY_ADDRESS, or set cluster.address=local to start Ray here"
        ) from error


@dataclass(frozen=True)
class Reservation:
    """A placement group whose bundles are given to ranks: entry r belongs to rank r."""

    group: "PlacementGroup"
    bundles: tuple[int, ...]
    nodes: tuple[str, ...]

    @property
    def num_nodes(self) -> int:
        """Different nodes that hold a rank."""
        return len(set(self.nodes))

    def release(self) -> None:
        """Give the resources back; actors that still run in the group are killed."""
        import ray

        if ray.is_initialized():
            ray.util.remove_placement_group(self.group)


def reserve(
    cluster: ClusterConfig,
    num_ranks: int,
    *,
    timeout_s: float = RESERVE_TIMEOUT_S,
    check: Callable[[], None] = lambda: None,
) -> Reservation:
    """Reserve one bundle for every rank, close together, and number the ranks node by node.

    `check` is called now and then while waiting; what it raises ends the wait. Raises ClusterError
    when the cluster is not free within `timeout_s`.
    """
    import ray

    check_capacity(cluster, num_ranks)
    bundles = [rank_resources(cluster) for _ in range(num_ranks)]
    group = ray.util.placement_group(bundles, strategy="PACK")
    try:
        is_ready = _wait(group, timeout_s, check)
    except BaseException:
        ray.util.remove_placement_group(group)
        raise
    if not is_ready:
        ray.util.remove_placement_group(group)
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        raise ClusterError(
            f"no room for {num_ranks} ranks of {_words(rank_resources(cluster))} each within "
            f"{timeout_s:g} s: {_words(free)} are free; wait for other runs "
            "on the cluster to end, or use fewer ranks"
        )
    nodes = _nodes_of_bundles(group, num_ranks)
    order = contiguous_by_node(nodes)
    return Reservation(group, tuple(order), tuple(nodes[bundle] for bundle in order))


def _wait(group: "PlacementGroup", timeout_s: float, check: Callable[[], None]) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        check()
        if group.wait(min(timeout_s, _POLL_S)):
            return True
    return False


def contiguous_by_node(nodes: Sequence[str]) -> list[int]:
    """Return the bundles in the order of ranks: `nodes[b]` holds bundle b; nodes are not mixed."""
    first = {node: index for index, node in reversed(list(enumerate(nodes)))}
    return sorted(range(len(nodes)), key=lambda bundle: (first[nodes[bundle]], bundle))


def _nodes_of_bundles(group: "PlacementGroup", num_ranks: int) -> list[str]:
    import ray

    deadline = time.monotonic() + _CONNECT_TIMEOUT_S
    while True:
        nodes = ray.util.placement_group_table(group)["bundles_to_node_id"]
        if all(nodes.get(bundle) for bundle in range(num_ranks)):
            return [str(nodes[bundle]) for bundle in range(num_ranks)]
        if time.monotonic() > deadline:
            raise ClusterError(
                "a node of the placement group was lost just after it was reserved; start again"
            )
        time.sleep(0.05)


def _words(resources: dict[str, float]) -> str:
    named = (f"{resources.get(kind, 0.0):g} {kind}s" for kind in ("CPU", "GPU"))
    return " and ".join(named)
