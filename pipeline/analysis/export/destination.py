"""Where an export goes, in any store: visible when it is whole; what is there already stays unless it is to be replaced.

A file and its keys are published together, the keys first. A folder of Parquet files is written beside its place and renamed;
in a remote store, where nothing can be renamed, its last file is `_SUCCESS`, as Spark and Hadoop write and expect it. What an
export that was killed has left beside a local destination has a name that ends in `.tmp`.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.analysis.export.sort import ORDER
from pipeline.dataset.partition import parquet_writer
from pipeline.dataset.read import Dataset
from pipeline.errors import ConfigError, StorageError
from pipeline.recipe import canonical
from pipeline.storage import Store, join, naming

KEYS_END = ".keys.parquet"
"""Added to the name of an array or an index: the file that names its rows."""
MARKER = "_SUCCESS"
"""A folder in a remote store is whole when it has this file."""
FOOTER_KEY = b"pipeline.export"
"""What the footer of a Parquet file says of its origin."""

_PART = re.compile(r"part-\d{5,}\.parquet")
_COLUMN_FOOTER_BYTES = 128
"""The footer needs less for a column of a row group: 61 to 65 were seen."""


@contextlib.contextmanager
def file_and_keys(dataset: Dataset, url: str, overwrite: bool) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file at `url`, and the one that names its rows. Whoever sees the first has the other.

    Raises:
        ConfigError: one of them is there and not to be replaced.
    """
    store, keys_url = dataset.table_.store, url + KEYS_END
    _check_outside(dataset, url)
    for each in (url, keys_url):
        local = store.local_path(each)
        if url.endswith("/") or (local is not None and Path(local).is_dir()):
            raise ConfigError(f"{each}: is a folder; name a file")
        if not overwrite and store.exists(each):
            raise ConfigError(f"{each}: exists already; --overwrite replaces it")
    with store.publish(url) as file, store.publish(keys_url) as keys:  # left in the opposite order
        yield file, keys
        if overwrite:
            store.delete(url)  # an old file never stands beside new keys


@contextlib.contextmanager
def folder(dataset: Dataset, url: str, overwrite: bool) -> Iterator[str]:
    """The folder to write to: locally one beside `url`, which takes its place in the end.

    Raises:
        ConfigError: see `check_folder`.
    """
    check_folder(dataset, url, overwrite)
    store = dataset.table_.store
    local = store.local_path(url)
    if local is None:
        with _remote_folder(store, url):
            yield url
        return
    target = Path(local)
    building, old = (target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp") for _ in range(2))
    try:
        yield str(building)
        check_folder(dataset, url, overwrite)
        with naming(url):
            if target.exists():
                target.rename(old)
            building.rename(target)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _remote_folder(store: Store, url: str) -> Iterator[None]:
    """The old export goes before the new one comes, its marker first: never is a mix of the two taken for either."""

    marker = join(store.absolute(url), MARKER)

    def clear() -> None:
        files = [file.url for file in store.list(url, missing_ok=True)]
        if marker in files:
            store.delete(marker)
        with ThreadPoolExecutor(16) as threads:
            for _ in threads.map(store.delete, [file for file in files if file != marker]):
                pass

    clear()
    try:
        yield
    except BaseException:
        with contextlib.suppress(StorageError):  # the error that led here is the one to report
            clear()
        raise


@contextlib.contextmanager
def temporary_folder(store: Store, url: str) -> Iterator[Path]:
    """Beside a local `url`, where there has to be room for the result; else where the system has it (`TMPDIR`)."""
    local = store.local_path(url)
    with naming(url):
        if local is not None:
            Path(local).parent.mkdir(parents=True, exist_ok=True)
            made = tempfile.TemporaryDirectory(prefix=f"{Path(local).name}.", suffix=".tmp", dir=Path(local).parent)
        else:
            made = tempfile.TemporaryDirectory(prefix="pipeline-export.")
    with made as name:
        yield Path(name)


def check_folder(dataset: Dataset, url: str, overwrite: bool) -> None:
    """Refuse what is in the way.

    Raises:
        ConfigError: `url` lies in the dataset; it exists and is not to be replaced, or holds what no export wrote.
    """
    _check_outside(dataset, url)
    store = dataset.table_.store
    local, top = store.local_path(url), join(store.absolute(url), "")
    names = [file.url.removeprefix(top) for file in store.list(url, missing_ok=True)]
    if not names and not (local and Path(local).exists()):  # remote folders are no more than the files in them
        return
    foreign = next((name for name in names if name != MARKER and not _PART.fullmatch(name)), None)
    if overwrite and foreign is not None:
        raise ConfigError(f"{url}: holds {foreign}, which no export wrote, and is not replaced")
    if not overwrite:
        unfinished = local is None and foreign is None and MARKER not in names
        state = f"holds an export that was never finished (it has no {MARKER})" if unfinished else "exists already"
        raise ConfigError(f"{url}: {state}; --overwrite replaces it")


def _check_outside(dataset: Dataset, url: str) -> None:
    store = dataset.table_.store
    if join(store.absolute(url), "").startswith(join(store.absolute(dataset.url), "")):
        raise ConfigError(f"{url}: lies in the dataset; name another place")


class Parts:
    """Writes rows in their order to Parquet files of a folder. A context manager: the last file is there when it ends."""

    def __init__(
        self, store: Store, folder_url: str, arrow_schema: pa.Schema, file_bytes: int, *, rounded: bool, footer: dict[str, Any]
    ) -> None:
        self._store, self._url, self._schema, self._file_bytes = store, folder_url, arrow_schema, file_bytes
        self._rounded, self._footer = rounded, canonical(footer)
        self._open = contextlib.ExitStack()
        self._part: tuple[BinaryIO, pq.ParquetWriter] | None = None
        self._num_groups = 0
        self._row_bytes = 0.0
        self.names: list[str] = []
        self.num_rows = self.num_bytes = 0

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        else:
            self._open.__exit__(kind, error, trace)

    def write(self, table: pa.Table) -> None:
        """Write one row group, into another file where it would make this one too large."""
        if self._part is not None and self._size_with(self._part[0], table.num_rows) > self._file_bytes:
            self._finish()
        file, writer = self._part = self._part or self._begin()
        before = file.tell()
        writer.write_table(table, row_group_size=max(1, table.num_rows))
        self._num_groups += 1
        self._row_bytes = max(self._row_bytes, (file.tell() - before) / max(1, table.num_rows))
        self.num_rows += table.num_rows

    def _size_with(self, file: BinaryIO, num_rows: int) -> float:
        """Of the whole file; the largest row group so far stands for the one to come."""
        footer = len(self._footer) + (self._num_groups + 1) * len(self._schema) * _COLUMN_FOOTER_BYTES
        return file.tell() + num_rows * self._row_bytes + footer

    def _begin(self) -> tuple[BinaryIO, pq.ParquetWriter]:
        self.names.append(f"part-{len(self.names):05d}.parquet")
        self._num_groups = 0
        file = self._open.enter_context(self._store.publish(join(self._url, self.names[-1])))
        writer = parquet_writer(file, self._schema, rounded=self._rounded, sorted_by=ORDER)
        self._open.enter_context(writer)
        writer.add_key_value_metadata({FOOTER_KEY: self._footer})
        return file, writer

    def _finish(self) -> None:
        if self._part is not None:
            file, writer = self._part
            writer.close()
            self.num_bytes += file.tell()
            self._part = None
        self._open.close()
