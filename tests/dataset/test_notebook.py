"""A dataset in a notebook: the table that it shows, and its rows in pandas."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas
import pytest
from datasets import write_dataset

import pipeline
from pipeline.dataset.read import Dataset
from pipeline.errors import DatasetError, UserError

EMBEDDINGS = {"small": np.arange(12, dtype=np.float32).reshape(4, 3), "large": np.ones((4, 1280), np.float32)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Four rows in two partitions, below a folder whose name is markup."""
    folder = tmp_path_factory.mktemp("notebook") / "<img src=x onerror=alert(1)>" / "out"
    return write_dataset(folder, EMBEDDINGS, [3, None, 2**60, 0], rows_per_shard=2, columns={"note": ["a", "b", None, "d"]})


class Cells(HTMLParser):
    """The texts of a table, and the tags that there are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_table_says_what_it_is_and_is_escaped(dataset: Dataset) -> None:
    cells = Cells(dataset._repr_html_())
    assert cells.tags == {"table", "tr", "th", "td"}
    shown = dict(zip(cells.texts[::2], cells.texts[1::2], strict=True))
    assert shown["dataset"] == dataset.url and "<img src=x" in shown["dataset"]
    assert shown["version"] == "0"
    assert shown["rows"] == "4 in 2 partitions"
    assert shown["quarantined"] == "0"
    assert shown["model"] == "none, weights none, float32"
    assert shown["embeddings"] == "small (3 x float32), large (1,280 x float32)"
    assert shown["columns"].startswith("key (string), label (int64), ")


def test_many_columns_are_counted(tmp_path: Path) -> None:
    columns = {f"c{number}": [number] for number in range(100)}
    shown = write_dataset(tmp_path / "out", {"e": np.ones((1, 2), np.float32)}, columns=columns)._repr_html_()
    assert re.search(r"c10 \(int64\), .*, and \d+ more<", shown)
    assert "c99" not in shown


def test_rows_in_pandas(dataset: Dataset) -> None:
    frame = dataset.to_pandas()
    assert list(frame.columns) == dataset.columns
    assert "small" not in frame.columns, "embeddings only where they are asked for"
    assert frame["key"].tolist() == dataset.keys()
    assert str(frame["label"].dtype) == "Int64"
    assert frame["label"].tolist() == [3, pandas.NA, 2**60, 0], "not a float that has lost its last digits"
    assert frame["note"].isna().tolist() == [False, False, True, False]
    chosen = dataset.to_pandas(["label", "small"])
    assert list(chosen.columns) == ["label", "small"]
    assert np.array_equal(np.stack(chosen["small"]), EMBEDDINGS["small"])
    assert chosen["small"][0].dtype == np.float32


def test_mistakes(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetError, match=r"there is no column 'lable'; did you mean label"):
        dataset.to_pandas(["lable"])
    monkeypatch.setitem(sys.modules, "pandas", None)  # what import sees where it is not installed
    with pytest.raises(UserError, match=r"pandas is not installed; `pip install 'frozen-pipeline\[notebook\]'` does it"):
        dataset.to_pandas()


def test_a_map_stays_in_its_frame(tmp_path: Path) -> None:
    """Labels are shown as text in a page that runs nothing, whole in an attribute."""
    rows = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    shown = write_dataset(tmp_path / "out", rows, ['"><script>1</script>', "b"] * 10)
    drawn = pipeline.plot_map(shown, pictures=False)
    frame = drawn._repr_html_()
    assert frame.startswith('<iframe srcdoc="') and frame.count("<") == 2 and " sandbox " in frame
    assert "&amp;lt;script&amp;gt;" in frame
    drawn.save(tmp_path / "map.html")
    html = (tmp_path / "map.html").read_text()
    assert html.count('fill="var(--c0)"') == 10 and "default-src 'none'" in html
    with pytest.raises(DatasetError, match="two rows at least"):
        pipeline.plot_map(write_dataset(tmp_path / "one", rows[:1]))
