"""Where actors fit, and what is asked of an autoscaler."""

from __future__ import annotations

import pytest

from pipeline.config import Run
from pipeline.extract.room import Node, Room, room_for
from pipeline.extract.scheduler import Place

ANY, WHOLE, QUARTER, LARGE = Place(), Place(num_gpus=1.0), Place(num_gpus=0.25), Place(num_gpus=0.4)
HEAD, CPU, GPU = Node("head", 0, 0), Node("cpu", 2, 0), Node("gpu", 8, 2)


@pytest.mark.parametrize(
    ("run", "nodes", "places", "more"),
    [
        # What there is, and where there is nothing one to begin with.
        ({}, [HEAD, CPU, Node("other", 4, 0)], [Place("cpu"), Place("other")], None),
        ({}, [HEAD, CPU, GPU], [WHOLE, WHOLE], None),
        ({}, [HEAD], [ANY], None),
        ({}, [Node("gpu", 0, 1)], [], WHOLE),
        # A number of actors: what does not fit is asked for.
        ({"workers": 1}, [HEAD, CPU], [Place("cpu")], ANY),
        ({"workers": 3}, [HEAD, CPU], [Place("cpu"), Place("cpu")], ANY),
        ({"workers": 3}, [CPU, Node("other", 1, 0)], [Place("cpu"), Place("other"), Place("cpu")], ANY),
        ({"workers": 3}, [HEAD], [], ANY),
        ({"workers": 3}, [GPU], [WHOLE, WHOLE], WHOLE),
        # A share of a GPU: never a CPU instead, and no share lies on two GPUs.
        ({"num_gpus": 1}, [HEAD, CPU], [], WHOLE),
        ({"num_gpus": 1}, [GPU], [WHOLE, WHOLE], WHOLE),
        ({"num_gpus": 0.25}, [GPU], [QUARTER] * 8, QUARTER),
        ({"num_gpus": 0.25}, [Node("few cores", 3, 1)], [QUARTER] * 3, QUARTER),
        ({"num_gpus": 0.4}, [Node("a", 8, 1), Node("b", 8, 1)], [LARGE] * 4, LARGE),
        ({"num_gpus": 0.25, "workers": 2}, [GPU], [QUARTER] * 2, QUARTER),
    ],
)
def test_room(run: dict[str, object], nodes: list[Node], places: list[Place], more: Place | None) -> None:
    found = room_for(Run(**run), nodes)
    most = run.get("workers")
    assert found == Room(places, more, most) if most else found == Room(places, more)
