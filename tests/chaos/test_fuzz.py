"""A little of `fuzz.py`, and bytes that hypothesis thinks of."""

from __future__ import annotations

import os
import signal
import tarfile
import time
from pathlib import Path

import fuzz
import numpy as np
import pyarrow as pa
import pytest
import torch
from fuzz import MAX_PIXELS, MEMORY_LIMIT_BYTES, TIME_LIMIT_S, Input, mutated, run
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipeline import config
from pipeline.config import Preprocess
from pipeline.errors import SampleError, ShardError
from pipeline.extract.decode import Decoder
from pipeline.source import Source

NUM_INPUTS = 3_000


def test_mutated_inputs_are_rows_or_refused_by_name(tmp_path: Path) -> None:
    tally = run(NUM_INPUTS, seed=1, num_processes=2, folder=tmp_path)
    assert tally.findings == []
    assert tally.num_inputs == NUM_INPUTS
    assert tally.slowest_s[0] < TIME_LIMIT_S
    assert tally.peak_bytes[0] < MEMORY_LIMIT_BYTES
    counts = tally.outcomes
    assert counts["row"] > NUM_INPUTS / 10, "some mutations must leave something to decode"
    assert min(counts[f"decode.{name}"] for name in ("Corrupt", "Truncated", "NotAnImage", "TooManyPixels")) > NUM_INPUTS / 300
    assert counts["ShardError"] > NUM_INPUTS / 30


class Saboteur:
    """Does, with four of the inputs, what no decoder may do."""

    def __init__(self, folder: Path) -> None:
        self._causes = {mutated(0, number).data: cause for number, cause in SABOTAGE.items()}

    def __call__(self, given: Input) -> list[str]:
        cause = self._causes.get(given.data)
        if cause == "exception":
            raise ZeroDivisionError
        if cause == "memory":
            np.ones(MEMORY_LIMIT_BYTES + (128 << 20), np.uint8)  # some of it may be memory that was freed before
        if cause == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if cause == "hang":
            time.sleep(60)
        return ["row"]


SABOTAGE = {20: "exception", 130: "memory", 131: "crash", 170: "hang"}


def test_what_must_not_happen_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "TIME_LIMIT_S", 10.0)  # under load the 384 MiB take more than a second
    tally = run(200, seed=0, num_processes=1, folder=tmp_path, make=Saboteur)
    found = {finding.number: finding.what for finding in tally.findings}
    words = {
        "exception": "ZeroDivisionError",
        "memory": " MiB",
        "crash": "Segmentation fault",
        "hang": "longer than 10 s",
    }
    assert sorted(found) == sorted(SABOTAGE)
    assert all(words[cause] in found[number] for number, cause in SABOTAGE.items())
    assert tally.num_inputs == 200
    for finding in tally.findings:
        fuzz.save(finding, 0, tmp_path)
        assert (tmp_path / f"0-{finding.number}.{mutated(0, finding.number).kind}").read_bytes() == mutated(
            0, finding.number
        ).data


MAGIC = [
    b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0",
    b"\xff\xd8\xff\xc2\0\x11\x08\0\x10\0\x10\3\1\x22\0\2\x11\1\3\x11\1",
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x10\0\0\0\x10\x08\2\0\0\0\x90\x91h6",
    b"GIF89a\x10\0\x10\0\x80\0\0\0\0\0\xff\xff\xff",
    b"RIFF\xff\0\0\0WEBPVP8X\x0a\0\0\0\2\0\0\0\x0f\0\0\x0f\0\0",
    b"BM\xff\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0\x10\0\0\0\x10\0\0\0\1\0\x08\0\1\0\0\0",
    b"II*\0\x08\0\0\0",
    b"MM\0*\0\0\0\x08",
    b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0",
    b"",
]


@pytest.mark.filterwarnings("ignore")  # of PIL; a program has its filters from the import of the decoder, pytest resets them
@hypothesis_settings(max_examples=400, deadline=None)
@given(magic=st.sampled_from(MAGIC), rest=st.binary(max_size=600), fast=st.booleans())
def test_any_bytes_are_a_picture_or_a_sample_error(magic: bytes, rest: bytes, fast: bool) -> None:
    slot_HWC = torch.zeros(28, 28, 3, dtype=torch.uint8)
    decoder = Decoder(Preprocess(resize=32, crop=28), fast=fast, max_pixels=MAX_PIXELS)
    try:
        width, height = decoder(magic + rest, slot_HWC)
        outcome = "decode" if 0 < width * height <= MAX_PIXELS else "a picture of no size"
    except SampleError as error:
        outcome = error.stage if error.message else "no message"
    assert outcome == "decode"


OCTAL = st.integers(0, 2_000).map(lambda number: b"%011o\0" % number)
HEADERS = st.fixed_dictionaries(
    {
        "name": st.one_of(st.sampled_from([b"a.jpg", b"a.cls", b"b/c.png", b"", b"x" * 100]), st.binary(max_size=100)),
        "size": st.one_of(OCTAL, OCTAL, st.binary(min_size=12, max_size=12), st.sampled_from([b"-0000001000\0", b"\xff" * 12])),
        "kind": st.sampled_from([bytes([each]) for each in b"0000\0123567xgLKXSVM"]),
        "rest": st.binary(max_size=255),
        "content": st.one_of(
            st.binary(max_size=1_500), st.sampled_from([b"17 path=other.jpg\n", b"11 size=-1\n", b"12 size=512\n"])
        ),
        "is_padded": st.booleans(),
    }
)
NEGATIVE = {"name": b"a.jpg", "size": b"-0000001000\0", "kind": b"0", "rest": b"", "content": b"", "is_padded": True}


@hypothesis_settings(max_examples=400, deadline=None)
@given(headers=st.lists(HEADERS, max_size=8), end=st.sampled_from([0, 511, 512, 1_024, 10_240]))
@example(headers=[NEGATIVE], end=1_024)
def test_any_headers_are_samples_or_a_shard_error(
    tmp_path_factory: pytest.TempPathFactory, headers: list[dict[str, bytes]], end: int
) -> None:
    parts = []
    for each in headers:
        header = bytearray(512)
        header[: len(each["name"])] = each["name"]
        header[124:136], header[156:157] = each["size"], each["kind"]
        header[257 : 257 + len(each["rest"])] = each["rest"]
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        parts += [bytes(header), each["content"], bytes(-len(each["content"]) % 512) if each["is_padded"] else b""]
    content = b"".join(parts) + bytes(end)
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    path.write_bytes(content)
    source = Source(config.Source(url=str(path), label="cls"))
    (shard,) = source.shards()
    found, failure = [], "a.tar"
    try:
        for sample in source.read(shard):
            found.append(sample)
    except ShardError as error:
        failure = str(error)
    assert "a.tar" in failure
    assert [sample.index for sample in found] == list(range(len(found)))
    pa.array([sample.key for sample in found], pa.string())
    for sample in found:
        if sample.offset is not None:
            assert content[sample.offset : sample.offset + (sample.nbytes or 0)] == bytes(sample.image)
    assert tarfile.BLOCKSIZE * len(found) <= len(content), "a sample takes a block at least"
