"""Ray Data as its documentation does batch inference: read_webdataset, map, map_batches with an actor, write_parquet.

    python ray_data.py --tars DIR --out DIR [--actors 2] [--threads 1] [--actor-cpus 50]

The raw bytes are read (`decoder=None`), decoded with PIL and put through the weights' preset in `map`. An actor reserves
`--actor-cpus` hundredths of a core: less than one, or nothing is left for the reading on two cores. `map` asks for as much,
so that Ray Data fuses it with `map_batches` and no decoded picture goes through the object store.
"""

from __future__ import annotations

import io
from typing import Any

import common
import ray
import torch
import torchvision  # noqa: F401  imported before the clock starts, as in every competitor
from PIL import Image


class Decode:
    """One row: encoded bytes to the model's input."""

    def __init__(self, model: str) -> None:
        self._preset = common.preset(model)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        image = Image.open(io.BytesIO(row["jpg"])).convert("RGB")
        return {"key": row["__key__"], "image": self._preset(image).numpy()}


class Embed:
    """The model in an actor."""

    def __init__(self, model: str, channels_last: bool, threads: int, stamps: common.Stamps) -> None:
        torch.set_num_threads(threads)
        self._model, _ = common.build(model, channels_last=channels_last)
        self._channels_last, self._stamps = channels_last, stamps

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        images_BCHW = torch.as_tensor(batch["image"])
        embeddings_BD = common.forward(self._model, images_BCHW, channels_last=self._channels_last)
        self._stamps.mark(len(embeddings_BD))
        return {"key": batch["key"], "embedding": embeddings_BD}


def main() -> None:
    arguments = common.arguments("Ray Data", actors=2, threads=1, actor_cpus=50, batch_size=common.BATCH_SIZE)
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    job = common.Job(arguments.out)
    decode = Decode(arguments.model)
    dataset = (
        ray.data.read_webdataset(str(arguments.tars), decoder=None)
        .map(lambda row: decode(row), num_cpus=arguments.actor_cpus / 100)
        .map_batches(
            Embed,
            batch_size=arguments.batch_size,
            compute=ray.data.ActorPoolStrategy(size=arguments.actors),
            num_cpus=arguments.actor_cpus / 100,
            fn_constructor_args=(arguments.model, arguments.channels_last, arguments.threads, common.Stamps(arguments.out)),
        )
    )
    dataset.write_parquet(str(arguments.out))
    job.done(
        sum(1 for _ in _rows(arguments.out)),
        actors=arguments.actors,
        threads=arguments.threads,
        actor_cpus=arguments.actor_cpus / 100,
        batch_size=arguments.batch_size,
    )


def _rows(out: Any) -> Any:
    import pyarrow.parquet as pq

    for file in out.rglob("*.parquet"):
        yield from range(pq.read_metadata(file).num_rows)


if __name__ == "__main__":
    main()
