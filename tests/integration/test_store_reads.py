"""What a run asks of an object store: loose files ahead of need, each once; large archives in pieces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bucket import Bucket
from conftest import noise, settings, tar_bytes
from faults import FaultProxy, Forward, Request, Response, Rule, delay
from s3 import S3Server

import pipeline
from pipeline import config
from pipeline.dataset.read import Dataset
from pipeline.rawfile import PIECE_BYTES

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint_url) as proxy:
        yield proxy


class Overlap:
    """A rule's action that delays each request and counts how many wait at once, which no slow machine changes."""

    def __init__(self) -> None:
        self.most = self._now = 0

    async def __call__(self, request: Request, forward: Forward) -> Response:
        self._now += 1
        self.most = max(self.most, self._now)
        response = await delay(0.5)(request, forward)
        self._now -= 1
        return response


def opened(bucket: Bucket) -> Dataset:
    storage = config.Storage(**bucket.storage)
    return pipeline.open_dataset(bucket.output, storage=storage, source_storage=storage)


def test_loose_files_are_requested_ahead_and_each_once(s3: S3Server, proxy: FaultProxy) -> None:
    bucket = Bucket(s3, proxy.endpoint_url)
    images = noise(60)
    for number, image in enumerate(images):
        bucket.fs.pipe_file(f"{bucket.name}/photos/{number:03}.png", image)
    bucket.fs.pipe_file(f"{bucket.name}/photos/empty.png", b"")

    def is_image(request: Request) -> bool:
        return request.method == "GET" and request.path.endswith(".png")

    overlap = Overlap()
    proxy.add(Rule(is_image, overlap))
    both = {"source__storage": bucket.storage, "output__storage": bucket.storage}
    summary = pipeline.run(settings(f"s3://{bucket.name}/photos/", bucket.output, source__label=None, **both))
    asked = [request.path for request in proxy.requests if is_image(request)]
    assert len(asked) == len(set(asked)) == 60, "nothing is read of a file without bytes"
    counted = summary.as_json()["images"]
    assert (counted["embedded"], counted["quarantined"]) == (60, 1)
    assert overlap.most >= 4, "one after the other there would be one at a time"
    dataset = opened(bucket)
    assert dataset.image("007.png") == images[7]


def test_an_archive_of_many_pieces(s3: S3Server, proxy: FaultProxy) -> None:
    bucket = Bucket(s3, proxy.endpoint_url)
    images = noise(12)
    filler = bytes(3 << 20)
    members = {
        f"{number:02}.{kind}": payload
        for number, image in enumerate(images)
        for kind, payload in (("bin", filler), ("png", image))
    }
    bucket.fs.pipe_file(f"{bucket.name}/shards/0.tar", tar_bytes(members))
    summary = pipeline.run(bucket.config(source__label=None))
    assert summary.as_json()["images"]["embedded"] == 12
    pieces = [request for request in proxy.requests if request.method == "GET" and request.path.endswith("0.tar")]
    assert len(pieces) == -(-len(tar_bytes(members)) // PIECE_BYTES)
    dataset = opened(bucket)
    assert [dataset.image(f"{number:02}") for number in range(12)] == images
