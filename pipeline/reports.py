"""The report of a version, made from all that is there of it: the dataset, the record of the run that committed it, the newest
probe that was trained on it, and the analyses that are quick enough. It lies beside the run, in `_runs/<run id>/report.html`.
And the page of two versions side by side.

This joins them; what the pages look like is `report/overview.py`'s and `report/comparison.py`'s. Memory: some 100 MB for the
charts, the embeddings of a dataset of at most `MAX_COMPARED` rows, and a few row groups at a time of any other.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import yaml
from numpy.typing import NDArray

from pipeline import config, runs
from pipeline.analysis.curate import CROWDED, THRESHOLD
from pipeline.dataset.diff import diff
from pipeline.dataset.read import Dataset
from pipeline.dataset.table import Table
from pipeline.errors import ConfigError, DatasetError, GuardError, SampleError, StorageError
from pipeline.report import sample as samples
from pipeline.report.comparison import Side, comparison
from pipeline.report.overview import Finding, Record, Strip, map_page, overview
from pipeline.report.page import Page
from pipeline.report.plane import Method
from pipeline.report.sample import Sample
from pipeline.storage import join

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipeline.analysis.curate.duplicates import Duplicates
    from pipeline.analysis.curate.outliers import Outliers

REPORT_FILE = "report.html"
"""In the folder of a run."""
MAX_COMPARED = 20_000
"""Rows of a dataset all of which are compared with each other. It takes 5 s at 1,280 features on two cores."""
MAX_DRIFT_BYTES = 256 << 20
"""Embeddings of the version before and of this one, up to which the drift between them is worth reading both."""
MAX_DIFF_ROWS = 2_000_000
GROUPS, ROWS_OF_GROUP, OUTLIERS = 3, 8, 8
"""What is shown of the duplicates, and of the outliers."""


def url_of(output: str, run_id: str) -> str:
    """Where the page of a run lies."""
    return join(output, runs.RUNS_FOLDER, run_id, REPORT_FILE)


def run_of(dataset: Dataset) -> str | None:
    """The run that committed a version; None where another program did, or the log no longer says."""
    # Of the newest version: deltalake numbers the commits wrongly when an older one is asked.
    newest = Table.open(dataset.table_.store, dataset.url)
    assert newest is not None, "it has the version that was opened"
    for commit in newest.history(newest.version - dataset.version + 1):
        if commit["version"] == dataset.version:
            return commit.get("run_id")
    return None


def write(dataset: Dataset, run_id: str | None, to: str | None = None, node: str | None = None, method: Method = "pca") -> str:
    """Make the page and publish it.

    Args:
        dataset: the version.
        run_id: the run that made it, if one did.
        to: any URL; beside the run when left out.
        node: embedding column to look at; the first one when left out.
        method: of the map.

    Returns:
        The URL of the page.

    Raises:
        ConfigError: there is no run to put it beside, or the method is not installed.
        DatasetError: no such column, or the version was vacuumed.
        StorageError: the dataset cannot be read, or the page not written.
    """
    if to is None and run_id is None:
        why = f"version {dataset.version} was committed by another program, and there is no run to put the page beside"
        raise ConfigError(f"to: {why}; give a file or a URL")
    store = dataset.table_.store
    place = to or url_of(dataset.url, run_id or "")
    sample = samples.draw(dataset, dataset.node(node))
    page = overview(dataset, sample, _record(dataset, run_id), _findings(dataset, sample), decode, method)
    store.write(place, page.encode("utf-8", "backslashreplace"))
    return place


def write_comparison(before: Dataset, after: Dataset, to: str, node: str | None = None) -> str:
    """Make the page of two versions side by side and publish it.

    Args:
        before: the version that the other one is compared with.
        after: the other one.
        to: any URL.
        node: embedding column to look at; the first one of each when left out.

    Returns:
        The URL of the page.

    Raises:
        DatasetError: no such column, or a version was vacuumed.
        StorageError: the dataset cannot be read, or the page not written.
    """
    num_bytes = sum(4 * sum(each.nodes.values()) * len(each) for each in (before, after))
    found = diff(before, after, drift=num_bytes <= MAX_DRIFT_BYTES).as_json()
    first, second = (
        Side(dataset=each, sample=samples.draw(each, each.node(node)), record=_record(each, run_of(each), whole=False))
        for each in (before, after)
    )
    after.table_.store.write(to, comparison(first, second, found, decode).encode("utf-8", "backslashreplace"))
    return to


def plot_map(dataset: Dataset, node: str | None = None, *, method: Method = "pca", pictures: bool = True) -> Page:
    """The map of a dataset for a notebook: a sample of its embeddings in a plane, coloured by label or by shard.

    Args:
        dataset: an opened version.
        node: embedding column; the first one when left out.
        method: `pca` for the two principal axes, or `umap`, which needs the extra of that name.
        pictures: read some of the images, which are shown on pointing at their points.

    Returns:
        What a notebook shows, and `save` writes to a file.

    Raises:
        ConfigError: the method is not installed.
        DatasetError: no such column, fewer than two rows, or the version was vacuumed.
        StorageError: the dataset cannot be read.
    """
    sample = samples.draw(dataset, dataset.node(node))
    if len(sample.rows) < 2:
        raise DatasetError(f"{dataset.url}: a map needs two rows at least")
    return Page(map_page(dataset, sample, decode if pictures else None, method))


def decode(image: bytes) -> Image:
    """An encoded image for a page, as RGB; of a damaged JPEG what it still shows.

    Raises:
        SampleError: there is no picture in it, or more of it than anyone writes.
    """
    from PIL import Image

    from pipeline.extract import jpeg, pil

    max_pixels: int = config.Source.model_fields["max_pixels"].default
    pil.allow(max_pixels)
    is_jpeg = image[:3] == b"\xff\xd8\xff"
    if is_jpeg:
        jpeg.check_scans(image, jpeg.read_header(image))
    try:
        return pil.picture(image, max_pixels)
    except SampleError as error:
        if not is_jpeg or error.error not in {"Truncated", "Corrupt"} or (pixels_HWC := jpeg.remains(image)) is None:
            raise
        return Image.fromarray(pixels_HWC)


def _record(dataset: Dataset, run_id: str | None, *, whole: bool = True) -> Record:
    """What lies in the folders of the runs, as far as it is there; `whole` with what differs from the version before."""
    store = dataset.table_.store
    run: dict[str, Any] = {}
    source: list[str] = []
    if run_id is not None:
        folder = join(dataset.url, runs.RUNS_FOLDER, run_id)
        with contextlib.suppress(StorageError, ValueError):
            run = json.loads(store.read(join(folder, "run.json")))
        with contextlib.suppress(StorageError, ValueError, yaml.YAMLError, KeyError):
            url = yaml.safe_load(store.read(join(folder, "config.yaml")))["source"]["url"]
            source = [url] if isinstance(url, str) else list(url)
    probe = runs.newest_metrics(store, dataset.url, dataset.version)
    return Record(run=run, source=source, diff=_diff(dataset) if whole else None, probe=probe)


def _diff(dataset: Dataset) -> dict[str, Any] | None:
    """How the version differs from the one before; None where that is gone, or too much has changed to be read again."""
    if dataset.version == 0:
        return None
    with contextlib.suppress(DatasetError, StorageError):
        table = Table.open(dataset.table_.store, dataset.url, dataset.version - 1)
        assert table is not None, "there is a later version"
        before = Dataset(table)
        paths = {entry.path for entry in before.entries()} & {entry.path for entry in dataset.entries()}
        changed = sum(entry.num_rows for each in (before, dataset) for entry in each.entries() if entry.path not in paths)
        if changed <= MAX_DIFF_ROWS:
            num_bytes = sum(4 * sum(each.nodes.values()) * len(each) for each in (before, dataset))
            return diff(before, dataset, drift=num_bytes <= MAX_DRIFT_BYTES).as_json()
    return None


def _findings(dataset: Dataset, sample: Sample) -> list[Finding]:
    """Duplicates and outliers of a dataset whose rows can all be compared; of a larger one the outliers of the sample."""
    from pipeline.analysis.curate import duplicates, outliers

    columns = ["content_hash", *(["label"] if "label" in dataset.columns else [])]
    is_small = len(dataset) <= MAX_COMPARED
    if is_small:
        among, positions_N, features_ND = "all rows", np.arange(len(dataset)), dataset.to_numpy(sample.node)
        table = dataset.table(columns)
    else:
        among, positions_N, features_ND = "the rows of the sample", sample.positions, sample.features
        table = pa.Table.from_pylist([{name: row[name] for name in columns} for row in sample.rows])
    if len(sample.rows) < 2:
        return []
    hashes_N = np.array(table.column("content_hash").to_pylist(), "S32")
    _, first_H, code_N = np.unique(hashes_N, return_index=True, return_inverse=True)
    targets_N = np.full(len(table), -1)
    if "label" in columns:
        targets_N = table.column("label").combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy().astype(np.int64)
    found = []
    with contextlib.suppress(GuardError):  # a value, or a length, that is not finite
        if is_small and len((copies := duplicates.find(features_ND, hashes_N, THRESHOLD)).grouped):
            found.append(_duplicates(dataset, copies))
        strange = outliers.find(features_ND, targets_N, first_H[code_N], OUTLIERS)
        if len(strange.rows):
            found.append(_outliers(dataset, strange, positions_N, among, "label" in columns))
    return found


def _duplicates(dataset: Dataset, copies: Duplicates) -> Finding:
    """The largest groups, each behind the row that stands for it."""
    rows_M = copies.grouped
    leaders_M = copies.representative[rows_M]
    strips: list[Strip] = []
    is_crowded = copies.share > CROWDED
    for leader in dict.fromkeys(leaders_M.tolist()):
        if is_crowded or len(strips) == GROUPS:
            break
        members = rows_M[(leaders_M == leader) & (rows_M != leader)]
        first, *others = dataset.take([leader, *members[:ROWS_OF_GROUP].tolist()], dataset.columns).to_pylist()
        texts = [f"{score:.4f}" for score in copies.similarity[members[:ROWS_OF_GROUP]].tolist()]
        strips.append(Strip(row=first, name=f"group of {len(members) + 1:,}", rows=others, texts=texts))
    text = (
        f"{len(copies.copies):,} rows have the bytes of an earlier row; {len(rows_M):,} rows are in "
        f"{len(np.unique(leaders_M)):,} groups of images that are alike (cosine at least {THRESHOLD:g}; two images at random: "
        f"{copies.chance[0]:.2f})."
    )
    text += f" {copies.share:.0%} of all pairs are: so alike, that says little here." if is_crowded else " The largest groups:"
    return Finding(title="Duplicates", text=text, strips=strips)


def _outliers(dataset: Dataset, strange: Outliers, positions_N: NDArray[np.int64], among: str, has_labels: bool) -> Finding:
    """The least typical rows."""
    rows = dataset.take(positions_N[strange.rows[:OUTLIERS]], dataset.columns).to_pylist()
    scores = zip(strange.similarity.tolist(), strange.usual.tolist(), strict=True)
    texts = [f"{score:.3f} of {usual:.3f}" for score, usual in scores]
    whose = "rows of their class" if has_labels else "others"
    text = f"Of {among}, those that are least like the nearest {whose}: mean cosine with these, and the median of that."
    return Finding(title="Outliers", text=text, strips=[Strip(rows=rows, texts=texts[:OUTLIERS])])
