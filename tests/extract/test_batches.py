"""The fixed number of batches that bounds the loop."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from pipeline.config import Backbone as Model
from pipeline.config import Node
from pipeline.extract.backbone import Backbone, Spec
from pipeline.extract.batches import Batches
from pipeline.extract.tune import Tuner, Way


def test_a_worker_gets_what_is_free_and_not_what_it_would_have_to_wait_for() -> None:
    model = Model(model="python/models:tiny", weights="seed:0", nodes={"embedding": Node(node="flatten")})
    backbone = Backbone(Spec(backbone=model, decode="exact", precision="float32"))
    batches = Batches(backbone, Tuner([Way(backbone.program, 2)]), count=3)
    with ThreadPoolExecutor(1) as thread:
        slots = thread.submit(batches.place, 8).result(timeout=10)  # four batches' worth, and there are three
        assert [slot for _, slot in slots] == [0, 1, 0, 1, 0, 1]
        waits = thread.submit(batches.place, 2)
        came = threading.Event()
        waits.add_done_callback(lambda _: came.set())
        assert not came.wait(0.2)
        batches.free(slots[0][0])
        assert [batch for batch, _ in waits.result(timeout=10)] == [slots[0][0]] * 2
