"""Large objects on a real S3 server: what becomes of them when the store stumbles, or the writer does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import fsspec.asyn
import numpy as np
import pytest
from bucket import Bucket
from faults import FaultProxy, Request, Rule, drop, status, swallow
from s3 import S3Server

from pipeline import storage
from pipeline.config import Storage
from pipeline.storage import Store

PART_BYTES = 5 << 20
"""The least that S3 takes."""
PAYLOAD = np.random.default_rng(0).bytes(12 << 20)


def publish(store: Store, url: str, payload: bytes = PAYLOAD) -> None:
    with store.publish(url) as file:
        for start in range(0, len(payload), 1 << 20):
            file.write(payload[start : start + (1 << 20)])


def uploads(bucket: Bucket) -> list[str]:
    """Keys of the uploads that nobody has ended."""
    page = fsspec.asyn.sync(bucket.fs.loop, bucket.fs._call_s3, "list_multipart_uploads", Bucket=bucket.name)
    return [each["Key"] for each in page.get("Uploads", [])]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "ONE_PUT_BYTES", PART_BYTES)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)


STEPS = pytest.mark.parametrize(
    "match",
    [
        lambda request: request.matches("POST", "?uploads"),
        lambda request: request.matches("PUT", "partNumber=2"),
        lambda request: request.matches("POST", "uploadId"),
    ],
    ids=["start", "part", "completion"],
)


@STEPS
def test_any_request_of_a_multipart_upload_is_tried_again(s3: S3Server, match: Callable[[Request], bool]) -> None:
    with FaultProxy(s3.endpoint_url) as proxy:
        bucket = Bucket(s3, proxy.endpoint_url)
        rules = [proxy.add(Rule(match, status(503), times=1)), proxy.add(Rule(match, drop, times=1))]
        publish(Store(Storage(**bucket.storage)), f"s3://{bucket.name}/large")
        assert [rule.num_applied for rule in rules] == [1, 1]
        assert bucket.fs.cat_file(f"{bucket.name}/large") == PAYLOAD
        assert proxy.count("PUT", "partNumber=3") == 1


@STEPS
def test_an_answer_that_was_lost_leaves_no_upload(s3: S3Server, match: Callable[[Request], bool]) -> None:
    """The server has begun, taken or ended it, and is asked again."""
    with FaultProxy(s3.endpoint_url) as proxy:
        bucket = Bucket(s3, proxy.endpoint_url)
        rule = proxy.add(Rule(match, swallow, times=1))
        publish(Store(Storage(**bucket.storage)), f"s3://{bucket.name}/large")
        assert rule.num_applied == 1
        assert bucket.fs.cat_file(f"{bucket.name}/large") == PAYLOAD
        assert uploads(bucket) == []


def test_a_page_in_a_bucket_is_shown_by_browsers(s3: S3Server) -> None:
    bucket = Bucket(s3)
    Store(Storage(**bucket.storage)).write(f"s3://{bucket.name}/page.html", b"<!doctype html>")
    assert bucket.fs.info(f"{bucket.name}/page.html")["ContentType"] == "text/html; charset=utf-8"


def test_a_writer_that_fails_leaves_no_upload(s3: S3Server) -> None:
    bucket = Bucket(s3)
    store = Store(Storage(**bucket.storage))
    with contextlib.suppress(ZeroDivisionError), store.publish(f"s3://{bucket.name}/large") as file:
        file.write(PAYLOAD)
        raise ZeroDivisionError
    assert bucket.fs.ls(bucket.name) == []
    assert uploads(bucket) == []


def test_parts_grow_where_there_would_be_too_many(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultProxy(s3.endpoint_url) as proxy:
        bucket = Bucket(s3, proxy.endpoint_url)
        monkeypatch.setattr(storage, "PARTS_OF_A_SIZE", 1)
        publish(Store(Storage(**bucket.storage)), f"s3://{bucket.name}/large", 2 * PAYLOAD)
        sizes = [request.num_sent_bytes >> 20 for request in proxy.requests if request.matches("PUT", "partNumber")]
        assert sizes == [5, 10, 9]
        assert bucket.fs.cat_file(f"{bucket.name}/large") == 2 * PAYLOAD
