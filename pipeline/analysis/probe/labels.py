"""What a probe needs to know of the rows besides their features: class, content hash, and perhaps group and part.

They are columns of the dataset, or of a CSV or Parquet file that is joined to it by key. Only labelled rows are kept: memory
follows their number, the file's, and one row group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import config
from pipeline.analysis.probe.head import Label
from pipeline.dataset.read import Dataset
from pipeline.errors import ConfigError, DatasetError, StorageRefused
from pipeline.storage import FileStat, Store

T = TypeVar("T")

_OWN = ("key", "content_hash")
"""Of the dataset, whatever a file may have in columns of these names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The labelled rows of a dataset, in its order."""

    index: NDArray[np.int64]
    """Which rows they are, ascending."""
    labels: list[Label]
    content_hashes: list[str]
    groups: list[Any] | None
    given: list[Any] | None
    """Values of the split column."""
    num_unlabelled: int
    num_unmatched_keys: int
    """Keys of the file that the dataset does not have."""
    warnings: list[str] = field(default_factory=list)


def encode(labels: Sequence[Label | None] | NDArray[Any], column: str) -> tuple[list[Label], NDArray[np.int64]]:
    """The sorted classes, and for each row its class index (N,) int64, -1 where there is no label.

    Raises:
        ConfigError: a label is neither a text nor a number, or there are less than two classes.
    """
    plain = labels.tolist() if isinstance(labels, np.ndarray) else [_plain(label) for label in labels]
    plain = [None if label != label else label for label in plain]  # NaN: how NumPy and pandas write a missing label
    for kind in {type(label) for label in plain} - {type(None)}:
        if not issubclass(kind, (str, int, float)):
            raise _wrong_kind("label", column, kind.__name__)
    classes = sorted({label for label in plain if label is not None}, key=lambda label: (isinstance(label, str), label))
    if not classes:
        raise _no_label(column, len(plain))
    if len(classes) < 2:
        raise ConfigError(f"probe.label: column {column!r} has the one class {classes[0]!r}; at least 2 are needed.")
    index = {label: row for row, label in enumerate(classes)}
    return classes, np.fromiter((-1 if label is None else index[label] for label in plain), np.int64, len(plain))


def fingerprint(store: Store, settings: config.Probe) -> str | None:
    """Of the file with the labels as it is now; None where there is none.

    Raises:
        ConfigError: the file is not there.
    """
    return None if settings.labels is None else _File(store, settings.labels).stat().fingerprint


def check(schema: pa.Schema, store: Store, settings: config.Probe) -> dict[str, bool]:
    """Whether all columns that the probe names are there, before anything is computed.

    Args:
        schema: columns of the dataset.
        store: how the file with the labels is reached.
        settings: the `probe` section.

    Returns:
        `label`, `group` and `split`, as far as they are named, and whether each comes from the file.

    Raises:
        ConfigError: the file or one of its columns is not there.
        DatasetError: the dataset has no such column.
    """
    names: dict[str, str | None] = {"label": settings.label, "group": settings.group, "split": settings.split}
    in_file: list[str] = []
    if settings.labels is not None:
        in_file = _File(store, settings.labels).columns()
        for what, name in (("labels_key", settings.labels_key), ("label", settings.label)):
            if name not in in_file:
                raise ConfigError(f"probe.{what}: {settings.labels} has no column {name!r}; it has {', '.join(in_file)}.")
    for what, column in names.items():
        if column is not None and column not in in_file:
            if column not in schema.names:
                where = "neither the dataset nor the file has a" if in_file else "the dataset has no"
                have = ", ".join(dict.fromkeys([*schema.names, *in_file]))
                raise DatasetError(f"probe.{what}: {where} column {column!r}; there are {have}")
            if not _is_plain(schema.field(column).type):
                raise _wrong_kind(what, column, str(schema.field(column).type))
    return {what: column in in_file for what, column in names.items() if column is not None}


def read(dataset: Dataset, settings: config.Probe) -> Rows:
    """The labelled rows of one version of a dataset.

    Raises:
        ConfigError: a column or the file is not there, the file gives a key two labels, or no row is labelled.
        DatasetError: the dataset has no such column.
    """
    store = dataset.table_.store
    is_in_file = check(dataset.schema, store, settings)
    own = {what: str(getattr(settings, what)) for what in is_in_file if not is_in_file[what]}
    joined = {what: str(getattr(settings, what)) for what in is_in_file if is_in_file[what]}
    file = _Join(_File(store, settings.labels), settings.labels_key, joined) if settings.labels is not None else None
    found, num_rows = [], 0
    for batch in dataset.iter_batches(list(dict.fromkeys([*_OWN, *own.values()]))):
        columns = {what: batch.column(name) for what, name in own.items()} | {name: batch.column(name) for name in _OWN}
        if file is not None:
            columns |= file.of(batch.column("key"), batch.column("content_hash"))
        columns["row"] = pa.array(np.arange(num_rows, num_rows + batch.num_rows))
        num_rows += batch.num_rows
        found.append(pa.table(columns).filter(pc.is_valid(columns["label"])))
    if file is not None:
        file.check_matches(dataset)
    if not any(table.num_rows for table in found):
        raise _no_label(settings.label, num_rows)
    rows = pa.concat_tables(found).combine_chunks()
    return Rows(
        index=rows.column("row").to_numpy(),
        labels=rows.column("label").to_pylist(),
        content_hashes=rows.column("content_hash").to_pylist(),
        groups=rows.column("group").to_pylist() if "group" in is_in_file else None,
        given=rows.column("split").to_pylist() if "split" in is_in_file else None,
        num_unlabelled=num_rows - rows.num_rows,
        num_unmatched_keys=file.num_unmatched if file is not None else 0,
        warnings=file.warnings() if file is not None else [],
    )


class _File:
    """A CSV or Parquet file."""

    def __init__(self, store: Store, url: str) -> None:
        self.url, self._store = url, store
        self._is_csv = url.lower().endswith(".csv")

    def stat(self) -> FileStat:
        """The file as it is now."""
        try:
            return self._store.stat(self.url)
        except StorageRefused as error:
            raise ConfigError(f"probe.labels: {error}") from None

    def columns(self) -> list[str]:
        """Their names; reads a header or a footer."""
        if self._is_csv:
            return self._opened(lambda file: list(pa_csv.open_csv(file).schema.names))
        return self._opened(lambda file: list(pq.read_schema(file).names))

    def read(self, names: Sequence[str], texts: Sequence[str]) -> pa.Table:
        """These columns; `texts` are those of them that are not guessed to be numbers or dates where they look so."""
        if not self._is_csv:
            return self._opened(lambda file: pq.read_table(file, columns=list(names)))
        options = pa_csv.ConvertOptions(
            include_columns=list(names),
            column_types=dict.fromkeys(texts, pa.string()),
            null_values=[""],  # `NA` may be Namibia
            strings_can_be_null=True,
        )
        return self._opened(lambda file: pa_csv.read_csv(file, convert_options=options))

    def _opened(self, act: Callable[[BinaryIO], T]) -> T:
        try:
            with self._store.open(self.stat()) as file:
                return act(file)
        except pa.ArrowException as error:
            kind = "CSV" if self._is_csv else "Parquet"
            raise ConfigError(f"probe.labels: {self.url}: cannot be read as {kind}: {error}") from None


class _Join:
    """The columns of a file by key, and how well the keys meet those of the dataset."""

    def __init__(self, file: _File, key: str, names: dict[str, str]) -> None:
        """Read the file.

        Args:
            file: where they lie.
            key: its column with the key.
            names: `label`, and perhaps `group` and `split`, to the file's columns.

        Raises:
            ConfigError: a key has two different values in one of these columns.
        """
        texts = [name for what, name in names.items() if what != "label"]
        table = file.read(list(dict.fromkeys([key, *names.values()])), list(dict.fromkeys([key, *texts])))
        columns = {what: table.column(name) for what, name in (("key", key), *names.items())}
        for what, column in columns.items():
            if not _is_plain(column.type):
                raise _wrong_kind("labels_key" if what == "key" else what, names.get(what, key), str(column.type))
            if pa.types.is_dictionary(column.type):
                columns[what] = column.cast(column.type.value_type)
        columns["key"] = columns["key"].cast(pa.large_string())
        distinct = pa.table(columns).filter(pc.is_valid(columns["key"])).group_by(list(columns)).aggregate([])
        self._url, self._key = file.url, key
        self._keys: pa.Array = distinct.column("key").combine_chunks()
        self._columns = {what: distinct.column(what).combine_chunks() for what in names}
        self._check_unique(distinct)
        self._is_met = np.zeros(len(self._keys), np.bool_)
        self._first_hash: dict[int, str] = {}
        self._num_ambiguous = 0

    def _check_unique(self, distinct: pa.Table) -> None:
        counts = distinct.group_by("key").aggregate([([], "count_all")])
        several = counts.filter(pc.greater(counts.column("count_all"), 1))
        if several.num_rows:
            key = several.column("key")[0]
            first, second = distinct.filter(pc.equal(distinct.column("key"), key)).slice(0, 2).to_pylist()
            what = next(name for name in self._columns if first[name] != second[name])
            raise ConfigError(
                f"probe.labels: {self._url}: key {key.as_py()!r} has the {what}s {first[what]!r} and {second[what]!r}; "
                f"{several.num_rows} keys have more than one"
            )

    def of(self, keys: pa.Array, content_hashes: pa.Array) -> dict[str, pa.Array]:
        """The columns for rows with these keys, null where the file does not have one."""
        index = pc.index_in(keys.cast(pa.large_string()), value_set=self._keys)
        valid = pc.is_valid(index)
        met, hashes = index.filter(valid).to_pylist(), content_hashes.filter(valid).to_pylist()
        self._is_met[met] = True
        first = map(self._first_hash.setdefault, met, hashes)
        self._num_ambiguous += sum(known != picture for known, picture in zip(first, hashes, strict=True))
        return {what: column.take(index) for what, column in self._columns.items()}

    @property
    def num_unmatched(self) -> int:
        """Keys that no row has."""
        return int((~self._is_met).sum())

    def check_matches(self, dataset: Dataset) -> None:
        """After the last row."""
        if not self._is_met.any():
            ours = next((str(key) for batch in dataset.iter_batches(["key"], 1) for key in batch.column("key")), "")
            some = f": its first is {self._keys[0].as_py()!r}, the dataset's {ours!r}" if len(self._keys) else ""
            number = len(self._keys)
            raise ConfigError(
                f"probe.labels: {self._url}: none of the {number} keys in its column {self._key!r} is in the dataset{some}."
            )

    def warnings(self) -> list[str]:
        """What a person should know of the join."""
        if not self._num_ambiguous:
            return []
        return [
            f"{self._num_ambiguous} rows have the key of another picture in another shard: the file knows keys only, and all of"
            " them got its label."
        ]


def _plain(label: Any) -> Any:
    return label.item() if isinstance(label, np.generic) else label


def _is_plain(kind: pa.DataType) -> bool:
    """Whether values are texts, numbers, or what is shown as one of them."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_one = (pa.types.is_primitive, pa.types.is_string, pa.types.is_large_string, pa.types.is_null)
    return any(each(kind) for each in is_one)


def _wrong_kind(what: str, column: str, kind: str) -> ConfigError:
    noun = {"label": "a class", "group": "a group", "split": "a part", "labels_key": "a key"}[what]
    return ConfigError(f"probe.{what}: column {column!r} holds {kind}; {noun} is a text or a number.")


def _no_label(column: str, num_rows: int) -> ConfigError:
    return ConfigError(f"probe.label: column {column!r} has no label in any of {num_rows} rows.")
