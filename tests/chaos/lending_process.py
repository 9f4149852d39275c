"""Two runs over the same shards in a process of its own: a calm one of one actor, and one whose helpers are killed.

    python tests/chaos/lending_process.py FOLDER NUM_KILLS

In FOLDER: `shards`. The runs write to `calm` and `lent`. A helper is killed while it has a loan in hand. Out, as the last line:
`{"killed", "report"}`, the ids of the processes that were killed, and what the second run says of itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import psutil
import ray
from conftest import settings

from pipeline import driver
from pipeline.extract import pool

NUM_ACTORS = 3
pools: list[WatchedPool] = []


class WatchedPool(pool.Pool):
    """Can be asked who helps, once somebody has helped."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        pools.append(self)

    def helpers(self) -> list[int]:
        """Processes of actors that have a loan in hand, and no shard."""
        workers = list(self._scheduler.workers) if self.num_lent else []
        return [worker.info["pid"] for worker in workers if worker.num_loans and not worker.in_hand]


def main() -> None:
    folder, num_kills = Path(sys.argv[1]), int(sys.argv[2])
    pool.Pool = WatchedPool  # type: ignore[misc]
    ray.init(address="local", num_cpus=NUM_ACTORS, num_gpus=0, include_dashboard=False, log_to_driver=False)
    model = {"model": "python/models:sleepy", "weights": "seed:0", "nodes": {"embedding": {"node": "pooled"}}}

    def run(output: str, num_actors: int) -> driver.Summary:
        how = {"workers": num_actors, "threads": 1, "optimize": "none", "batch_size": 8}
        return driver.run(settings(f"{folder}/shards/*.tar", folder / output, backbone=model, run=how))

    run("calm", 1)
    killed, ended = list[int](), threading.Event()

    def kill() -> None:
        while len(killed) < num_kills and not ended.wait(0.02):
            for pid in pools[-1].helpers() if len(pools) > 1 else []:
                if pid not in killed and len(killed) < num_kills:
                    killed.append(pid)
                    psutil.Process(pid).send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        summary = run("lent", NUM_ACTORS)
        ended.set()
        killer.join()
        num_before = len(os.listdir(folder / "lent" / "_delta_log"))
        assert not run("lent", NUM_ACTORS).committed
        assert len(os.listdir(folder / "lent" / "_delta_log")) == num_before
    finally:
        ended.set()
        ray.shutdown()  # which has its own word on actors that died
    print(json.dumps({"killed": killed, "report": summary.as_json()}))


if __name__ == "__main__":
    main()
