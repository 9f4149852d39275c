"""Decoding in a process of its own gives the same pictures, and survives those that kill."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from images import encode, jpeg, photo
from killers import deadly

from pipeline.config import Preprocess
from pipeline.errors import SampleError, WorldError
from pipeline.extract.decode import Decoder
from pipeline.extract.isolated import IsolatedDecoder

MAX_PIXELS = 10_000_000


@pytest.fixture(scope="module")
def isolated() -> Iterator[IsolatedDecoder]:
    decoder = IsolatedDecoder(Preprocess(), fast=False, max_pixels=MAX_PIXELS, imports=["killers"], timeout_s=2.0)
    yield decoder
    decoder.close()


def slot() -> torch.Tensor:
    side = Preprocess().crop
    return torch.zeros(side, side, 3, dtype=torch.uint8)


@pytest.mark.parametrize("data", [jpeg(1, 640, 480), encode(photo(90, 333), "PNG")], ids=["jpeg", "png"])
def test_the_same_picture(isolated: IsolatedDecoder, data: bytes) -> None:
    expected, found = slot(), slot()
    assert isolated(data, found) == Decoder(Preprocess(), fast=False, max_pixels=MAX_PIXELS)(data, expected)
    assert found.any() and torch.equal(found, expected)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "Empty"),
        (b"no picture", "NotAnImage"),
        (deadly("kill"), "Crashed"),
        (deadly("hang"), "Hung"),
        (deadly("hold"), "Hung"),
    ],
    ids=["empty", "text", "kill", "hang", "hold"],
)
def test_what_cannot_be_decoded_is_refused_and_the_next_one_is_decoded(
    isolated: IsolatedDecoder, data: bytes, error: str
) -> None:
    with pytest.raises(SampleError) as refused:
        isolated(data, slot())
    assert (refused.value.stage, refused.value.error) == ("decode", error)
    assert isolated(jpeg(), slot()) == (32, 24)


def test_a_process_that_does_not_start_is_no_picture_s_fault() -> None:
    broken = IsolatedDecoder(Preprocess(), fast=False, max_pixels=MAX_PIXELS, imports=["no_such_module"], timeout_s=2.0)
    with pytest.raises(WorldError, match="did not start"):
        broken(jpeg(), slot())
