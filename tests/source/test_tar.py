"""Members of an archive as this program reads them, against Python's own reader."""

from __future__ import annotations

import gzip
import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import pipeline.errors
import pipeline.rawfile
import pipeline.storage
from pipeline import config
from pipeline.source import Source, tar
from pipeline.storage import FileStat, Store

NAMES = st.one_of(
    st.text("abc/.é", min_size=1, max_size=12).filter(lambda name: name.strip("/.")),
    st.text("xy/", min_size=90, max_size=300).filter(lambda name: name.strip("/")),
    st.text("zü", min_size=120, max_size=160),
)
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def archive(members: list[tuple[str, bytes]], form: int, mtime: float = 0, kinds: dict[int, bytes] | None = None) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as made:
        for number, (name, payload) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(payload), mtime  # type: ignore[assignment]
            if kinds and number in kinds:
                info.type, info.linkname, info.size = kinds[number], "elsewhere", 0
            made.addfile(info, io.BytesIO(payload))
    return file.getvalue()


def read(path: Path, content: bytes) -> list[tuple[str, int | None, bytes]]:
    """Name, offset and content of every member."""
    path.write_bytes(content)
    source = Source(config.Source(url=str(path)))
    (shard,) = source.shards()
    found = tar.members(source.store, shard, lambda _: 1 << 30)
    return [(each.name, each.offset, bytes(each.payload or b"")) for each in found]


def expected(content: bytes) -> list[tuple[str, int, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(content), errors="surrogateescape") as made:
        members = [member for member in made.getmembers() if not member.isdir()]
        return [
            (member.name, member.offset_data, made.extractfile(member).read() if member.isreg() else b"")  # type: ignore[union-attr]
            for member in members
        ]


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    members=st.lists(st.tuples(NAMES, st.binary(max_size=2000)), max_size=12),
    form=st.sampled_from(list(FORMATS)),
    mtime=st.sampled_from([0, 1.5, 1e9]),
    block=st.sampled_from([1, 511, 512, 700, 1 << 20]),
)
def test_same_members_as_pythons_reader(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, bytes]], form: str, mtime: float, block: int
) -> None:
    try:
        content = archive(members, FORMATS[form], mtime)
    except ValueError:  # a name that this format cannot hold
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.storage, "LOCAL_BLOCK_BYTES", block)
        found = read(tmp_path_factory.mktemp("tar") / "a.tar", content)
        packed = read(tmp_path_factory.mktemp("tar") / "a.tar.gz", gzip.compress(content))
    assert found == expected(content)
    assert packed == [(name, None, payload) for name, _, payload in found]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CONTTYPE])
@pytest.mark.parametrize("position", [0, 2, 4])
def test_among_what_is_no_plain_file_nothing_is_lost(tmp_path: Path, kind: bytes, position: int) -> None:
    members = [(f"{number}.jpg", bytes([number]) * 700) for number in range(5)]
    content = archive(members, tarfile.GNU_FORMAT, kinds={position: kind})
    assert read(tmp_path / "a.tar", content) == expected(content)


def test_large_members_that_nobody_wants_are_passed_over(tmp_path: Path) -> None:
    sizes = {"a.bin": 3 << 20, "b.jpg": 100, "c.bin": 40 << 20, "d.jpg": 2 << 20}
    content = archive([(name, bytes(size)) for name, size in sizes.items()], tarfile.USTAR_FORMAT)
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    del content
    source = Source(config.Source(url=str(path)))
    (shard,) = source.shards()
    tracemalloc.start()
    try:
        wanted = tar.members(source.store, shard, lambda name: 4 << 20 if name.endswith(".jpg") else None)
        found = {member.name: None if member.payload is None else len(member.payload) for member in wanted}
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == {"a.bin": None, "b.jpg": 100, "c.bin": None, "d.jpg": 2 << 20}
    assert peak_bytes < 8 << 20


def test_on_a_remote_store_they_are_not_even_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.rawfile, "PIECE_BYTES", 1_000)
    monkeypatch.setattr(tar, "MAX_PASSED_BYTES", 2_000)
    sizes = {"a.bin": 30_000, "b.jpg": 100, "c.bin": 700, "d.jpg": 5_000, "e.bin": 90_000, "f.jpg": 1}
    content = archive([(name, name.encode() * size) for name, size in sizes.items()], tarfile.USTAR_FORMAT)
    store = Store()
    store.locate("memory://tar/a.tar")[0].pipe_file("/tar/a.tar", content)
    source = Source(config.Source(url="memory://tar/a.tar"))
    (shard,) = source.shards()
    num_bytes = []
    original = Store._read_piece

    def watched(self: Store, file: FileStat, start: int, length: int) -> bytes:
        num_bytes.append(length)
        return original(self, file, start, length)

    monkeypatch.setattr(Store, "_read_piece", watched)
    wanted = tar.members(source.store, shard, lambda name: 1 << 20)
    assert [(member.name, bytes(member.payload or b"")) for member in wanted] == [
        (name, name.encode() * size) for name, size in sizes.items()
    ]
    assert sum(num_bytes) >= len(content) - 10_240
    num_bytes.clear()
    monkeypatch.setattr(tar, "FREE_BYTES", 0)
    wanted = tar.members(source.store, shard, lambda name: 1 << 20 if name.endswith(".jpg") else None)
    assert {member.name: member.payload and len(member.payload) for member in wanted} == {
        name: None if name.endswith("bin") else len(name) * size for name, size in sizes.items()
    }
    assert sum(num_bytes) < 60_000


def test_a_flipped_bit_in_a_header_is_noticed(tmp_path: Path) -> None:
    content = bytearray(archive([("a.jpg", b"1" * 600), ("b.jpg", b"2" * 600)], tarfile.USTAR_FORMAT))
    content[1536 + 100] ^= 1  # the second member's mode
    with pytest.raises(pipeline.errors.ShardError, match="bad checksum"):
        read(tmp_path / "a.tar", bytes(content))
