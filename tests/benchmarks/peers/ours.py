"""This package: `pipeline.driver.run` with a config, Ray started beforehand just as for Ray Data.

    python ours.py --tars DIR --out DIR [--decode exact]

The steady rate counts all images from the moment when the first actor is ready to the moment when the last shard is
published: reading the first shard and publishing the last one are in it, so it is a lower bound.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import common
import ray
import torchvision  # noqa: F401  imported before the clock starts, as in every competitor

from pipeline import config, driver
from pipeline.extract import actors, backbone  # noqa: F401


class Watch:
    """An observer that looks at the clock."""

    def __init__(self) -> None:
        self.ready: float | None = None
        self._last, self._num_images = 0.0, 0

    def planned(self, plan: Any) -> None:
        """Only when an actor is ready is told by nobody: look at what the pool does with it."""
        started = getattr(actors.Pool, "_started", None)
        if started is None:
            return

        def timed(pool: Any, ref: Any) -> None:
            started(pool, ref)
            self.ready = self.ready or time.monotonic()

        actors.Pool._started = timed  # type: ignore[method-assign]

    def finished(self, result: Any, num_actors: int) -> None:
        self._last = time.monotonic()
        self._num_images += result.partition.num_embedded if result.partition else 0

    def note(self, text: str) -> None:
        pass

    def steady_images_per_s(self) -> float | None:
        return self._num_images / (self._last - self.ready) if self.ready else None


def main() -> None:
    arguments = common.arguments("frozen-pipeline")
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    job, watch = common.Job(arguments.out), Watch()
    own = arguments.model == "null"
    settings = config.parse(
        {
            "source": {"url": f"{Path(arguments.tars).absolute()}/*.tar"},
            "backbone": {
                "model": "python/null:model" if own else f"torchvision/{arguments.model}",
                "weights": "builtin" if own else "seed:0",
                "nodes": {"embedding": {"node": "flatten"}},
            },
            "decode": arguments.decode,
            "output": {"url": str(Path(arguments.out).absolute())},
        }
    )
    summary = driver.run(settings, observer=watch)
    num_images = sum(each.num_embedded for each in summary.extracted)
    told = ("device", "threads", "batch_size", "model")
    chosen = [{name: actor[name] for name in told if name in actor} for actor in summary.actors]
    job.done(num_images, steady_images_per_s=watch.steady_images_per_s(), decode=arguments.decode, actors=chosen)


if __name__ == "__main__":
    main()
