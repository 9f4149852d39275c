"""The gallery of a dataset that a run made of images whose names, labels and captions mean no good."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import crops, settings
from names import NAMES, SHOWN
from PIL import Image

import pipeline
from pipeline import driver
from pipeline.dataset.read import Dataset
from pipeline.errors import SampleError
from pipeline.extract import pil
from pipeline.report import gallery as galleries
from pipeline.report.gallery import Section, gallery

IMAGES = crops(8, size=(320, 200))


class Page(HTMLParser):
    """The elements of a page and its texts, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip() and self.tags[-1][0] != "style":
            self.texts.append(data.strip())

    def images(self) -> list[Image.Image]:
        found = []
        for tag, attributes in self.tags:
            if tag == "img":
                assert attributes["src"].startswith("data:image/jpeg;base64,")
                found.append(Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2]))))
        return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    columns = {"image": IMAGES, "name": NAMES, "class": NAMES[::-1], "caption": [f"of {name}" for name in NAMES]}
    pq.write_table(pa.table(columns), folder / "a.parquet", compression="none")
    return folder / "a.parquet"


@pytest.fixture(scope="module")
def dataset(source: Path, local_ray: None) -> Dataset:
    columns = {"source__image": "image", "source__key": "name", "source__label": "class", "source__columns": ["caption"]}
    driver.run(settings(source, source.parent / "out", **columns))
    return pipeline.open_dataset(str(source.parent / "out"))


def decode(image: bytes) -> Image.Image:
    return pil.picture(image, 1_000_000)


def section(dataset: Dataset, number: int) -> Section:
    """One row and all others."""
    rows = dataset.table(dataset.columns).to_pylist()
    row = rows.pop(number)
    return Section(kind="key", name=row["key"], scores=[0.5] * len(rows), rows=rows, row=row)


def test_whatever_comes_from_data_is_shown_as_text(dataset: Dataset) -> None:
    html = gallery(dataset, [section(dataset, 0)], decode, [("where", "<i>label</i>")])
    page = Page(html)
    for name in NAMES:
        assert page.texts.count(SHOWN.get(name, name)) == 2, "the key of one row, and the label of another"
        assert f"of {SHOWN.get(name, name)}" in page.texts
    assert "<i>label</i>" in page.texts
    allowed = {"html", "head", "meta", "title", "style", "body", "header", "h1", "dl", "div", "dt", "dd", "bdi", "main"}
    allowed |= {"section", "figure", "img", "figcaption", "span", "h2", "ol", "li", "code", "footer"}
    assert {tag for tag, _ in page.tags} <= allowed
    assert {name for _, attributes in page.tags for name in attributes} <= {
        "lang", "charset", "name", "content", "http-equiv", "class", "src", "width", "height", "alt",
    }  # fmt: skip
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00\x1b]", html)


def test_a_page_is_one_file_that_loads_and_runs_nothing(dataset: Dataset) -> None:
    html = gallery(dataset, [section(dataset, 7)], decode)
    page = Page(html)
    policy = next(attributes["content"] for _, attributes in page.tags if attributes.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not re.search(r"url\(|@import|https?://", html)
    assert "prefers-color-scheme: dark" in html
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_the_query_comes_first_and_then_its_neighbours_in_order(dataset: Dataset) -> None:
    wanted = section(dataset, 3)
    page = Page(gallery(dataset, [wanted, section(dataset, 0)], decode))
    places = [text for text in page.texts if text.startswith("a.parquet, ")]
    assert places == [f"a.parquet, {number}" for number in (3, 0, 1, 2, 4, 5, 6, 7, *range(8))]
    order = [IMAGES[3], *IMAGES[:3], *IMAGES[4:], *IMAGES]
    for shown, image in zip(page.images(), order, strict=True):
        original = Image.open(io.BytesIO(image))
        assert shown.size == (240, 150)
        difference = np.asarray(shown.resize((8, 8)), float) - np.asarray(original.resize((8, 8)), float)
        assert np.abs(difference).mean() < 2


def test_a_picture_that_cannot_be_shown_says_why(dataset: Dataset, source: Path) -> None:
    whole = source.read_bytes()

    def refuse(image: bytes) -> Image.Image:
        if image == IMAGES[2]:
            raise SampleError("decode", "TooManyPixels", "<b>too many</b>")
        return decode(image)

    start = whole.index(IMAGES[1])
    source.write_bytes(whole[: start + 500] + bytes(500) + whole[start + 1000 :])
    try:
        page = Page(gallery(dataset, [section(dataset, 0)], refuse))
    finally:
        source.write_bytes(whole)
    assert len(page.images()) == 6
    assert "<b>too many</b>" in page.texts
    assert any(text.startswith("the source has changed since version 0: ") for text in page.texts)


def test_queries_that_are_no_rows(dataset: Dataset) -> None:
    rows = dataset.table(dataset.columns).to_pylist()[:2]
    vector = Section(kind="vector", name="vector 3", scores=[1.0, -0.25], rows=rows)
    image = Section(kind="image", name="s3://bucket/a/photo.jpg", scores=[], rows=[], image=IMAGES[5])
    page = Page(gallery(dataset, [vector, image], decode))
    assert len(page.images()) == 3
    for text in ("a vector has no picture", "vector 3", "1.0000", "-0.2500", "photo.jpg", "No row was found."):
        assert text in page.texts


def test_a_page_has_an_end(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(galleries, "MAX_ROWS", 3)
    monkeypatch.setattr(galleries, "MAX_TILES", 7)
    page = Page(gallery(dataset, [section(dataset, number) for number in range(5)], decode))
    assert len(page.images()) == 2 * (1 + 3)
    assert "Shown are 2 of 5 queries, and of each at most 3 rows." in page.texts
