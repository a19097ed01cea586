"""Connecting to Ray, room for the ranks, and the order in which ranks get their places."""

import itertools
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cluster.resources as resources
from cluster.config.sections import ClusterConfig
from cluster.resources import (
    ClusterError,
    check_capacity,
    connect,
    contiguous_by_node,
    rank_resources,
    reserve,
)


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcd"), max_size=12))
def test_ranks_on_one_node_are_neighbours_and_every_bundle_is_used_once(nodes: list[str]) -> None:
    order = contiguous_by_node(nodes)
    assert sorted(order) == list(range(len(nodes)))
    placed = [nodes[bundle] for bundle in order]
    changes = sum(a != b for a, b in itertools.pairwise(placed))
    assert changes == max(0, len(set(nodes)) - 1)


def test_bundles_in_order_stay_in_order() -> None:
    assert contiguous_by_node(["b", "b", "a", "a"]) == [0, 1, 2, 3]
    assert contiguous_by_node(["b", "a", "b", "a"]) == [0, 2, 1, 3]


def test_a_rank_on_cuda_takes_a_gpu() -> None:
    assert rank_resources(ClusterConfig(cpus_per_rank=0.5)) == {"CPU": 0.5}
    assert rank_resources(ClusterConfig(device="cuda")) == {"CPU": 1.0, "GPU": 1.0}


def test_an_existing_connection_is_used_and_left_open(ray_cluster: None) -> None:
    import ray

    with connect(ClusterConfig(address="10.255.0.1:1"), num_ranks=8):
        assert ray.is_initialized()
    assert ray.is_initialized()


def test_missing_gpus_are_told_with_the_remedy(ray_cluster: None) -> None:
    with pytest.raises(ClusterError, match=r"2 ranks need 2 GPUs .* has 0; .*cluster.device=cpu"):
        check_capacity(ClusterConfig(device="cuda"), 2)


def test_a_reservation_has_one_place_a_rank_and_is_given_back(ray_cluster: None) -> None:
    import ray

    reservation = reserve(ClusterConfig(cpus_per_rank=4.0), 3)
    assert sorted(reservation.bundles) == [0, 1, 2]
    assert reservation.num_nodes == 1
    assert reservation.nodes[0] == ray.get_runtime_context().get_node_id()
    with pytest.raises(ClusterError, match=r"no room for 2 ranks of 8 CPUs and 0 GPUs each"):
        reserve(ClusterConfig(cpus_per_rank=8.0), 2, timeout_s=0.5)
    reservation.release()
    reserve(ClusterConfig(cpus_per_rank=8.0), 2, timeout_s=30).release()


def test_an_address_where_nothing_answers_is_one_clear_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"no Ray cluster answers at {address}") as caught:
            resources._check_answers(address)
    assert "\n" not in str(caught.value)


def test_a_ray_that_does_not_come_up_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**options: object) -> None:
        raise Exception("The current node timed out during startup. This could happen.\nMore.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with (
        pytest.raises(ClusterError, match="did not start .* timed out .*; wait until") as caught,
        connect(ClusterConfig(address="local"), warn=lambda line: None),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_ray_client_is_refused_in_favour_of_a_job() -> None:
    with pytest.raises(ClusterError, match="baton submit"):
        resources._connect_to("ray://10.0.0.1:10001")
