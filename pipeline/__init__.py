"""Images to embeddings at scale: frozen models on Ray actors, one trustworthy dataset out.

    import pipeline

    pipeline.run(pipeline.load_config("config.yaml"))
    embeddings = pipeline.open_dataset("data/embeddings").to_numpy("embedding")

Importing this package loads neither torch nor ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import load as load_config
    from pipeline.dataset.read import open_dataset
    from pipeline.driver import run
    from pipeline.reports import plot_map

__all__ = ["load_config", "open_dataset", "plot_map", "run"]

_HOMES = {
    "run": ("pipeline.driver", "run"),
    "open_dataset": ("pipeline.dataset.read", "open_dataset"),
    "plot_map": ("pipeline.reports", "plot_map"),
    "load_config": ("pipeline.config", "load"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)
