"""What other installed packages add, by entry points: formats of sources, and providers of models.

    [project.entry-points."frozen_pipeline.sources"]
    zip = "my_package.zip_archives"           # a module with the functions of `pipeline.source.sample.Format`

    [project.entry-points."frozen_pipeline.backbones"]
    openclip = "my_package.openclip:build"    # a `pipeline.extract.model.Provider`

A config names them as it names our own: `format: zip`, `model: openclip/ViT-B-32`. Nothing is imported before one does. They
run with all rights of this program, as every installed package can; on a cluster they have to be installed on every node.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from pipeline.errors import ConfigError

SOURCES, BACKBONES = "frozen_pipeline.sources", "frozen_pipeline.backbones"


def names(group: str) -> list[str]:
    """What the installed packages add to a group."""
    return sorted({point.name for point in entry_points(group=group)})


def load(group: str, name: str) -> Any:
    """What a name stands for, imported.

    Raises:
        ConfigError: no package adds it, several do, or its import fails.
    """
    points = {point.value: point for point in entry_points(group=group, name=name)}
    if len(points) != 1:
        found = f"{len(points)} packages add it: {', '.join(sorted(points))}" if points else "no installed package adds it"
        raise ConfigError(f"{group}: {name}: {found}")
    (point,) = points.values()
    try:
        return point.load()
    except Exception as error:  # the package's own code
        raise ConfigError(f"{group}: {name} ({point.value}) cannot be imported: {type(error).__name__}: {error}") from None
