"""The process that `helpers.Cluster` keeps a Ray cluster in.

Out: `{"address"}`. In: `{"do": "add"}`, answered by `{"raylet"}`; `{"do": "drain", "raylet"}`, which gives a node notice; and
`{"do": "kill", "raylet"}`, answered by `{"killed"}`, the ids of all processes of that node. All nodes end with this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from typing import Any

import psutil
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

OBJECT_STORE_BYTES = 80 << 20
"""Plans and hashes: no pixel and no embedding enters it."""
PREEMPTION = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
SETTINGS: dict[str, Any] = {
    "node_ip_address": "127.0.0.1",
    "object_store_memory": OBJECT_STORE_BYTES,
    "include_log_monitor": False,
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers may come in between

    def tell(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    head = {**SETTINGS, "num_cpus": 0, "include_dashboard": False, "no_monitor": True}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes: dict[int, Any] = {}
    try:
        tell(address=cluster.address)
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "add":
                node = cluster.add_node(num_cpus=1, **SETTINGS)
                raylet = node.all_processes["raylet"][0].process
                nodes[raylet.pid] = node
                tell(raylet=raylet.pid)
            elif request["do"] == "drain":
                node = nodes[request["raylet"]]
                gcs = GcsClient(address=cluster.address)
                deadline_ms = time.time_ns() // 1_000_000 + 600_000
                accepted, why = gcs.drain_node(node.node_id, PREEMPTION, "the price went up", deadline_ms)
                tell(accepted=accepted, why=why)
            else:
                node = nodes.pop(request["raylet"])
                cluster.worker_nodes.discard(node)
                tell(killed=kill(node))
    finally:
        cluster.shutdown()


def kill(node: Any) -> list[int]:
    """SIGKILL the processes that the node has started, and theirs."""
    started = [info.process for infos in node.all_processes.values() for info in infos]
    family = []
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            family += [parent, *parent.children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for process in started:
        process.wait()
    return [process.pid for process in family]


if __name__ == "__main__":
    main()
