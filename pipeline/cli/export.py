"""The command that writes a dataset in the form that another tool wants."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from pipeline import config
from pipeline.cli.common import AsJson, EndpointUrl, OutputUrl, reporting
from pipeline.errors import ConfigError

Kind = Literal["npy", "parquet", "faiss"]
ONLY_FOR: dict[str, Kind] = {"row-group-rows": "parquet", "file-bytes": "parquet", "faiss-index": "faiss"}
"""Options that mean something for one kind."""


def export(
    url: OutputUrl,
    destination: Annotated[str, typer.Argument(metavar="DEST", help="File (npy, faiss) or folder (parquet), at any URL.")],
    kind: Annotated[
        Kind,
        typer.Option("--to", help="An array to map into memory, Parquet files sorted by key, or an index for FAISS."),
    ],
    node: Annotated[
        str | None, typer.Option(help="Embedding column; for npy and faiss the first, for parquet all when left out.")
    ] = None,
    version: Annotated[int | None, typer.Option(metavar="N", help="Version of the dataset; the newest when left out.")] = None,
    row_group_rows: Annotated[
        int | None, typer.Option(metavar="N", help="parquet: rows of a row group; as in the dataset when left out.")
    ] = None,
    file_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="parquet: the size of a file; 512MB when left out."),
    ] = None,
    faiss_index: Annotated[
        str | None,
        typer.Option(metavar="FACTORY", help="faiss: a factory string, such as IVF1024,Flat; Flat when left out."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an export has written there before.")] = False,
    endpoint_url: EndpointUrl = None,
    as_json: AsJson = False,
) -> None:
    """Write a dataset for other tools, whole or not at all.

    Row i of an array or index is named by row i of DEST.keys.parquet. npy and parquet need less than 1 GB of memory whatever
    the size; a FAISS index is made in memory.

    Example: pipeline export data/embeddings --to npy embeddings.npy
    """
    with reporting(as_json) as report:
        import time

        from pipeline.analysis import export as exports
        from pipeline.dataset.read import open_dataset
        from pipeline.report import terminal

        _check_options(kind, {"row-group-rows": row_group_rows, "file-bytes": file_bytes, "faiss-index": faiss_index})
        dataset = open_dataset(url, version, config.Storage(endpoint_url=endpoint_url))
        start = time.monotonic()
        with terminal.Rows(len(dataset)) as watch:
            common: dict[str, Any] = {"node": node, "overwrite": overwrite, "progress": watch}
            if kind == "npy":
                done = exports.to_npy(dataset, destination, **common)
            elif kind == "faiss":
                done = exports.to_faiss(dataset, destination, factory=faiss_index or "Flat", **common)
            else:
                size = _num_bytes(file_bytes) if file_bytes is not None else exports.FILE_BYTES
                done = exports.to_parquet(dataset, destination, row_group_rows=row_group_rows, file_bytes=size, **common)
        report |= {
            "output": url,
            "version": dataset.version,
            "to": kind,
            "destination": destination,
            "files": done.files,
            "rows": done.num_rows,
            "bytes": done.num_bytes,
            "seconds": round(time.monotonic() - start, 3),
        }
        if not as_json:
            terminal.show_export(report)


def _check_options(kind: Kind, given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is not None and kind != ONLY_FOR[name]:
            raise ConfigError(f"{name}: {value!r} means nothing with --to {kind}, only with --to {ONLY_FOR[name]}")


def _num_bytes(text: str) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise ConfigError(f"file-bytes: {text!r} is not a size; allowed are 512MB, 1GB, 64MiB or a number of bytes") from None
