"""The process that `helpers.Cluster` keeps a Ray cluster in.

    python cluster_process.py [--cpus N] [--gpus N] [--dashboard PORT --agent PORT]

Out: `{"address"}`. In: `{"do": "add"}`, answered by `{"raylet"}`; `{"do": "drain", "raylet"}`, which gives a node notice; and
`{"do": "kill", "raylet"}`, answered by `{"killed"}`, the ids of all processes of that node. All nodes end with this process.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
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

    arguments = parse()
    head = {**SETTINGS, "num_cpus": 0, "include_dashboard": arguments.dashboard is not None, "no_monitor": True}
    if arguments.dashboard is not None:  # jobs are submitted to it, and started by the head's agent
        head |= {"dashboard_host": "127.0.0.1", "dashboard_port": arguments.dashboard}
        head |= {"dashboard_agent_listen_port": arguments.agent}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes: dict[int, Any] = {}
    numbers = itertools.count(1)
    try:
        tell(address=cluster.address)
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "add":
                # A folder of its own, as on a machine of its own: a job's files are unpacked there.
                folder = os.path.join(os.environ["RAY_TMPDIR"], str(next(numbers)))
                node = cluster.add_node(num_cpus=arguments.cpus, num_gpus=arguments.gpus, temp_dir=folder, **SETTINGS)
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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpus", type=int, default=1, help="of each node but the head")
    parser.add_argument("--gpus", type=int, default=0, help="of each node but the head; they exist in Ray's books only")
    parser.add_argument("--dashboard", type=int, help="its port")
    parser.add_argument("--agent", type=int, help="port of the head's agent")
    return parser.parse_args()


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
