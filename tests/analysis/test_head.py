"""A saved probe: what goes into its file comes out again, and anything else is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import save

from pipeline.analysis.probe import head
from pipeline.analysis.probe.head import Head
from pipeline.errors import ConfigError

RANDOM = np.random.default_rng(0)
HEAD = Head(
    weight=RANDOM.normal(size=(3, 4)).astype(np.float32),
    bias=RANDOM.normal(size=3).astype(np.float32),
    classes=["cat", "dog", "猫"],
    normalize="l2",
    node="middle",
    label="breed",
    recipe={"model": "python/models:tiny", "node": {"node": "flatten", "pool": "none"}},
)


def test_everything_survives_the_file():
    found = head.load(HEAD.dump())
    for field in dataclasses.fields(Head):
        assert np.array_equal(getattr(found, field.name), getattr(HEAD, field.name)), field.name


def test_an_l2_head_divides_features_by_their_norms():
    features = RANDOM.normal(size=(50, 4)).astype(np.float32) * 7
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    plain = dataclasses.replace(HEAD, normalize="none")
    assert np.allclose(HEAD.log_probabilities(features), plain.log_probabilities(unit), atol=1e-5)
    assert not np.allclose(plain.log_probabilities(features), plain.log_probabilities(unit), atol=0.1)
    assert np.array_equal(HEAD.predict(features)[0], plain.predict(unit)[0])


def test_rows_of_zeros_are_no_error():
    _, probabilities = HEAD.predict(np.zeros((1, 4), np.float32))
    assert np.allclose(probabilities, np.exp(HEAD.bias) / np.exp(HEAD.bias).sum(), atol=1e-6)


GOOD = HEAD.dump()
OTHER_NAMES = save({"w": HEAD.weight, "bias": HEAD.bias}, metadata={"classes": '["a", "b", "c"]'})
NO_METADATA = save({"weight": HEAD.weight, "bias": HEAD.bias})
TWO_CLASSES = save({"weight": HEAD.weight, "bias": HEAD.bias}, metadata={"classes": '["a", "b"]'})
NOT_JSON = save({"weight": HEAD.weight, "bias": HEAD.bias}, metadata={"classes": "a, b, c"})
UNKNOWN = dataclasses.replace(HEAD, normalize="zscore").dump()


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x00" * 40, id="zeros"),
        pytest.param(b"PAR1" * 20, id="parquet"),
        pytest.param(GOOD[:-1], id="one byte short"),
        pytest.param(GOOD[:60], id="cut in the header"),
        pytest.param(OTHER_NAMES, id="other tensors"),
        pytest.param(NO_METADATA, id="no metadata"),
        pytest.param(TWO_CLASSES, id="fewer classes than rows"),
        pytest.param(NOT_JSON, id="classes not JSON"),
        pytest.param(UNKNOWN, id="unknown normalisation"),
    ],
)
def test_what_is_no_probe_is_refused(payload):
    with pytest.raises(ConfigError, match=r"^probe\.st: not a probe; it is a file probe\.safetensors"):
        head.load(payload, "probe.st")
