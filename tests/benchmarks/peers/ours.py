"""This package: `pipeline.driver.run` with a config, Ray started beforehand just as for Ray Data.

    python ours.py --tars DIR --out DIR [--decode exact] [--batch-size N] [--compile 1]

Without settings it runs with its defaults. With `--compile 1` the program is compiled before the clock starts, once, and kept:
that is how a run of many images goes on after its first minute, and every run after it from the start.

The steady rate goes from the first batch that was embedded to the last shard that was published, with the images of all batches
but the first.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import common
import ray
import torchvision  # noqa: F401  imported before the clock starts, as in every competitor

from pipeline import config, driver
from pipeline.extract import backbone  # noqa: F401


class Watch:
    """An observer that looks at the clock."""

    def __init__(self) -> None:
        self.last = 0.0

    def started(self, run_id: str) -> None:
        pass

    def planned(self, plan: Any) -> None:
        pass

    def finished(self, result: Any, num_actors: int) -> None:
        self.last = time.time()

    def note(self, text: str) -> None:
        pass


def main() -> None:
    arguments = common.arguments("frozen-pipeline", batch_size=0, compile=0)
    own = arguments.model == "null"
    model = config.Backbone(
        model="python/null:model" if own else f"torchvision/{arguments.model}",
        weights="builtin" if own else "seed:0",
        nodes={"embedding": config.Node(node="flatten")},
    )
    run = {"batch_size": arguments.batch_size or "auto", "report": False}
    if arguments.compile:
        common.compiled(model, arguments.decode, arguments.batch_size)
        run["optimize"] = "compile"
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    job, watch = common.Job(arguments.out), Watch()
    settings = config.parse(
        {
            "source": {"url": f"{Path(arguments.tars).absolute()}/*.tar"},
            "backbone": model.model_dump(),
            "run": run,
            "decode": arguments.decode,
            "output": {"url": str(Path(arguments.out).absolute())},
        }
    )
    summary = driver.run(settings, observer=watch)
    num_images = sum(each.num_embedded for each in summary.extracted)
    told = ("device", "threads", "batch_size", "model")
    chosen = [{name: actor[name] for name in told if name in actor} for actor in summary.actors]
    first = min(actor["first_batch_at"] for actor in summary.actors)
    steady = (num_images - summary.actors[0]["batch_size"]) / (watch.last - first)
    job.done(num_images, steady_images_per_s=steady, decode=arguments.decode, actors=chosen)


if __name__ == "__main__":
    main()
