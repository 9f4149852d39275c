"""The process that `helpers.Autoscaled` keeps a Ray cluster with an autoscaler in.

A head without CPUs, and Ray's own autoscaler with nodes that are processes of this machine.

Out: `{"address"}`. In: `{"do": "nodes"}`, answered by `{"nodes"}`, the number of nodes that are there besides the head. All
nodes end with this process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
from typing import Any

HEAD = "f" * 51 + "00000"
OBJECT_STORE_BYTES = 80 << 20
MAX_NODES = 2
IDLE_MINUTES = 0.05
ENVIRONMENT = {
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    # The autoscaler finds its head by this.
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
}


def main() -> None:
    os.environ |= ENVIRONMENT  # before Ray is imported
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers may come in between

    def tell(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    import psutil
    import ray
    from ray.cluster_utils import Cluster

    with socket.socket() as free, tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        json.dump(autoscaler(port), file)
        file.flush()
        free.close()
        head = {
            "num_cpus": 0,
            "node_ip_address": "127.0.0.1",
            "gcs_server_port": port,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "include_log_monitor": False,
            "autoscaling_config": file.name,
        }
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
            tell(address=cluster.address)
            for _ in sys.stdin:
                alive = [node for node in ray.nodes() if node["Alive"]]
                tell(nodes=len(alive) - 1)
        finally:
            # The autoscaler's nodes are its children; none outlives this process.
            family = psutil.Process().children(recursive=True)
            ray.shutdown()
            cluster.shutdown()
            for process in family:
                if process.is_running():
                    process.send_signal(signal.SIGKILL)


def autoscaler(port: int) -> dict[str, Any]:
    """Its config: nodes of one CPU and one GPU, which are taken away when they were idle for 3 s."""
    nothing: dict[str, Any] = {name: {} for name in ("auth", "docker", "file_mounts")}
    commands = ("setup_commands", "initialization_commands", "head_setup_commands", "worker_setup_commands")
    files = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "head_start_ray_commands", "worker_start_ray_commands")
    resources = {"CPU": 1, "GPU": 1, "object_store_memory": OBJECT_STORE_BYTES}
    return {
        **nothing,
        **{name: [] for name in (*commands, *files)},
        "file_mounts_sync_continuously": False,
        "cluster_name": "test",
        "max_workers": MAX_NODES,
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": HEAD,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": MAX_NODES},
        },
    }


if __name__ == "__main__":
    main()
