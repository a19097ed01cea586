"""A Ray cluster of several nodes on this machine, run as a program of its own.

Two Rays do not fit into one process, and the session's `ray_cluster` must not be disturbed; so
the tests start this file, read one line of JSON from it, and close its standard input to end it.
RAY_TMPDIR must name a short folder of its own: Ray writes the address of "the" cluster there.
"""

import json
import socket
import sys


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(num_nodes: int, cpus_per_node: int) -> None:
    from ray.cluster_utils import Cluster

    dashboard_port = free_port()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": cpus_per_node,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": dashboard_port,
            "dashboard_agent_listen_port": free_port(),
        },
    )
    for node in range(1, num_nodes):
        # Nodes of one machine share a session folder; in one folder for the files of jobs, a node
        # that unpacks a job's would delete them under the feet of those that were faster.
        cluster.add_node(num_cpus=cpus_per_node, runtime_env_dir_name=f"runtime_resources_{node}")
    answer = {
        "job_server": f"http://127.0.0.1:{dashboard_port}",
        "gcs_address": cluster.address,
        "num_nodes": num_nodes,
    }
    print(json.dumps(answer), flush=True)
    sys.stdin.read()
    cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
