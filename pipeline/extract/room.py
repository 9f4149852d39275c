"""What a cluster has room for: where actors fit, and what those that do not fit ask its autoscaler for.

With `actors.py` and `pool.py` all that talks to Ray. An actor that has no place yet is how the autoscaler hears of a need: it
goes when the run does, which a standing request for resources would not.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import ray

from pipeline import config
from pipeline.extract.scheduler import Place


@dataclass(frozen=True, slots=True)
class Node:
    """A node that actors may run on."""

    node_id: str
    num_cpus: float
    num_gpus: float


@dataclass(frozen=True, slots=True)
class Room:
    """Where actors fit, and whether more of them are wanted."""

    places: Sequence[Place]
    """Of all actors that the nodes have room for, whoever uses it now."""
    more: Place | None = None
    """What further actors are to ask for; None where nobody is asked."""
    most: int = sys.maxsize
    """Actors wanted in all."""


def room_for(run: config.Run, nodes: Sequence[Node]) -> Room:
    """Places for the actors of a run.

    `auto` takes what there is, a whole GPU an actor where there are any, else a CPU node each; what an autoscaler could add it
    cannot know, and asks only for what it takes to begin. Where the config says a number, of actors or of GPUs, those that do
    not fit wait for what the autoscaler adds.
    """
    most = sys.maxsize if run.workers == "auto" else run.workers
    if run.num_gpus != "auto" or any(node.num_gpus >= 1 for node in nodes):
        share = 1.0 if run.num_gpus == "auto" else run.num_gpus
        place = Place(num_gpus=share)
        # An actor's share lies on one GPU.
        fits = sum(min(int(node.num_cpus), int(node.num_gpus) * int(1 / share + 1e-9)) for node in nodes)
        asks = run.num_gpus != "auto" or run.workers != "auto" or not fits
        return Room([place] * min(fits, most), place if asks else None, most)
    with_cpu = [node for node in nodes if node.num_cpus >= 1]
    if run.workers == "auto":
        return Room([Place(node.node_id) for node in with_cpu] or [Place()])
    turns = range(min(most, int(max((node.num_cpus for node in with_cpu), default=0))))
    places = [Place(node.node_id) for turn in turns for node in with_cpu if node.num_cpus > turn]
    return Room(places[:most], Place(), most)


def nodes_but(draining: Collection[str]) -> list[Node]:
    """Nodes that are there, but for these."""
    found = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]  # type: ignore[no-untyped-call]
    return [Node(node["NodeID"], node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0)) for node in found]


def draining_nodes() -> Collection[str]:
    """Nodes that will be taken away, such as spot instances that were given notice.

    Ray has no public way to ask; its own libraries ask so.
    """
    from ray._private.state import state

    nodes: dict[str, int] = state.get_draining_nodes()
    return nodes.keys()


def wanting(places: Collection[Place]) -> str:
    """What actors without a node wait for: `4 actors of 1 GPU and 1 CPU each; the cluster has 0 GPUs free`."""
    num_gpus = max(place.num_gpus for place in places)
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    gpus = f"{num_gpus:g} GPU and " if num_gpus else ""
    actors = f"{len(places)} actors of {gpus}1 CPU each" if len(places) > 1 else f"an actor of {gpus}1 CPU"
    left = " and ".join(f"{free.get(name, 0):g} {name}s" for name in (("GPU", "CPU") if num_gpus else ("CPU",)))
    return f"{actors}; the cluster has {left} free"
