"""Committed datasets made from arrays, without a run: embeddings that a test has chosen."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import Storage
from pipeline.dataset import partition, table
from pipeline.dataset.partition import Partition, PartitionWriter, Quarantined, Target
from pipeline.dataset.read import Dataset, open_dataset
from pipeline.recipe import FORMAT_VERSION, Layout, Recipe, digest
from pipeline.storage import Store


def write_dataset(
    folder: Path | str,
    embeddings: NDArray[np.float32] | Mapping[str, NDArray[np.float32]],
    labels: Sequence[Any] | None = None,
    *,
    keys: Sequence[str] | None = None,
    content_hashes: Sequence[str] | None = None,
    rows_per_shard: int | Sequence[int] = 100,
    columns: Mapping[str, Sequence[Any]] | None = None,
    precision: str = "float32",
    storage: Storage | None = None,
    rows_per_group: int | None = None,
    quarantined_per_shard: int = 0,
) -> Dataset:
    """Write a dataset and commit its first version.

    Args:
        folder: where it shall lie; any URL.
        embeddings: (N, D) float32, or several columns of them by name.
        labels: the column `label`; no such column when left out.
        keys: `00000` and so on when left out.
        content_hashes: of the key, when left out.
        rows_per_shard: so many rows have the same shard; or the number of rows of each shard, which may be 0.
        columns: what else is carried along, and any of `PLACES` where it is not to be made up.
        precision: of the recipe. With float16 and bfloat16 values are stored as rounded, which they have to be.
        storage: how to reach `folder`.
        rows_per_group: rows of a row group; as in a run when left out.
        quarantined_per_shard: samples that could not be embedded.
    """
    arrays = dict(embeddings) if isinstance(embeddings, Mapping) else {"embedding": embeddings}
    num_rows = len(next(iter(arrays.values())))
    keys = keys if keys is not None else [f"{row:05d}" for row in range(num_rows)]
    rows: dict[str, Sequence[Any]] = {
        "key": keys,
        "content_hash": content_hashes if content_hashes is not None else [digest(key) for key in keys],
        **({"label": labels} if labels is not None else {}),
        **(columns or {}),
    }
    carried = [pa.field(name, pa.array(list(values)).type) for name, values in rows.items() if name == "label"]
    carried += [pa.field(name, pa.array(list(values)).type) for name, values in (columns or {}).items() if name not in PLACES]
    recipe = Recipe(
        fields={"model": "none", "weights": "none", "nodes": {name: {} for name in arrays}, "precision": precision},
        widths={name: values.shape[1] for name, values in arrays.items()},
    )
    layout = Layout(fields={"format_version": FORMAT_VERSION, "format": "webdataset", "label": None, "columns": {}})
    schema = partition.schema(recipe, carried)
    target = Target(store=Store(storage), url=str(folder), recipe=recipe, layout=layout, schema=schema)
    step = rows_per_group or partition.rows_per_group(recipe)
    finished = []
    counts = rows_per_shard if not isinstance(rows_per_shard, int) else [rows_per_shard] * -(-num_rows // rows_per_shard)
    for shard, start in enumerate(itertools.accumulate(counts[:-1], initial=0) if counts else ()):
        part = slice(start, min(start + counts[shard], num_rows))
        piece = {name: list(values[part]) for name, values in rows.items()}
        some = {name: values[part] for name, values in arrays.items()}
        finished.append(_write(target, f"file:///shards/{shard:05d}.tar", piece, some, step, quarantined_per_shard))
    table.create(target, "run 0", finished)
    return open_dataset(str(folder), storage=storage)


PLACES = ("width", "height", "url", "offset", "nbytes")
"""Columns of a source that there need not be."""


def _write(
    target: Target,
    shard: str,
    rows: dict[str, list[Any]],
    embeddings: Mapping[str, NDArray[np.float32]],
    step: int,
    num_quarantined: int,
) -> Partition:
    """The partition of one shard."""
    num_rows = len(rows["key"])
    rows = {
        "shard": [shard] * num_rows,
        "index": list(range(num_rows)),
        "url": [shard] * num_rows,
        "offset": [512 + 2048 * index for index in range(num_rows)],
        "nbytes": [1000 + index for index in range(num_rows)],
        "width": [100] * num_rows,
        "height": [75] * num_rows,
        **rows,
    }
    made = Partition(
        path=partition.new_path(target.identity(shard, digest(shard))),
        num_bytes=0,
        shard=shard,
        fingerprint=digest(shard),
        recipe_id=target.recipe.recipe_id,
        layout_id=target.layout.layout_id,
        num_rows=num_rows,
        num_read=num_rows + num_quarantined,
        num_embedded=num_rows,
        num_carried_over=0,
        num_quarantined=num_quarantined,
    )
    quarantined = [
        Quarantined(key=f"bad {index}", shard=shard, index=index, offset=None, stage="decode", error="Corrupt", message="no")
        for index in range(num_rows, num_rows + num_quarantined)
    ]
    url = f"{target.url}/{made.path}"
    with target.store.publish(url) as file:
        writer = PartitionWriter(file, target.schema, rounded=target.recipe.rounded)
        for start in range(0, num_rows, step):
            group = slice(start, start + step)
            writer.write({name: values[group] for name, values in rows.items()}, {n: a[group] for n, a in embeddings.items()})
        writer.close(partition.footer(target, made, quarantined))
    return dataclasses.replace(made, num_bytes=target.store.stat(url).num_bytes)
