"""The page of a run in a real browser: of images whose names, labels and errors mean no good, and of digits with a probe."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import chromium, shown
from conftest import crops, settings
from datasets import write_dataset
from playwright.sync_api import Browser
from quick import committed
from sklearn.decomposition import PCA
from test_gallery import NAMES, SHOWN

from pipeline import reports
from pipeline.dataset.read import Dataset
from pipeline.report import overview, pictures, plane, sample

GOOD = len(NAMES)
BAD_KEYS = ["<b>broken</b>", "\u202ebroken"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Eight pictures, and two that cannot be decoded."""
    folder = tmp_path_factory.mktemp("hostile")
    images = [*crops(GOOD, size=(160, 100)), b"no picture", b"no picture either"]
    names, labels = [*NAMES, *BAD_KEYS], [*NAMES[::-1], "x", "y"]
    columns = {"image": images, "name": names, "class": labels, "caption": [f"of {name}" for name in names]}
    pq.write_table(pa.table(columns), folder / "a.parquet", compression="none")
    source = {"source__image": "image", "source__key": "name", "source__label": "class", "source__columns": ["caption"]}
    return committed(settings(folder / "a.parquet", folder / "out", **source))


@pytest.fixture(scope="module")
def page(hostile: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    reports.write(hostile, None, str(file))
    return file


def test_whatever_comes_from_data_is_shown_as_text(browser: Browser, page: Path) -> None:
    with shown(browser, page) as seen:
        text = seen.page.evaluate("document.body.textContent")
        tags = set(seen.page.evaluate("[...document.querySelectorAll('*')].map(each => each.localName)"))
        handlers = seen.page.evaluate(
            "[...document.querySelectorAll('*')].flatMap(each => each.getAttributeNames()).filter(name => name.startsWith('on'))"
        )
        assert (seen.requests, seen.messages, handlers) == ([], [], [])
    for name in [*NAMES, *BAD_KEYS]:
        expected = SHOWN.get(name, name).replace("\u202e", r"\u202e")
        assert expected in text
    assert not tags & {"script", "iframe", "object", "embed", "link", "a", "form", "image", "foreignObject", "b"}
    html = page.read_text()
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00\x1b]", html)
    assert html.count("<img src=\"data:image/jpeg;base64,") == html.count("<img ")


@pytest.mark.parametrize(("size", "scheme"), list(itertools.product(("desktop", "phone"), ("light", "dark"))))
def test_it_fits_the_window_and_asks_for_nothing(browser: Browser, page: Path, size: str, scheme: str) -> None:
    with shown(browser, page, size, scheme) as seen:
        width, overflow = seen.page.evaluate("[innerWidth, document.documentElement.scrollWidth]")
        assert overflow <= width
        background, color = seen.page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        point = seen.page.evaluate("getComputedStyle(document.querySelector('.map .mark-symbol path')).fill")
        assert (seen.requests, seen.messages) == ([], [])
    light, dark = (sum(map(int, re.findall(r"\d+", each)[:3])) for each in (background, color))
    assert (light > dark) == (scheme == "light"), "the page is light, or it is dark"
    assert point in COLORS[scheme]


@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_a_point_shows_its_picture(browser: Browser, page: Path, size: str) -> None:
    with shown(browser, page, size) as seen:
        spots = seen.page.locator(".spot")
        assert spots.count() == GOOD
        for number in range(GOOD):
            picture = spots.nth(number).locator("img")
            assert not picture.is_visible()
            spots.nth(number).focus()
            assert picture.is_visible()
            assert picture.evaluate("each => each.naturalWidth") >= pictures.SMALL_SIDE
            box, window = spots.nth(number).locator(".tile").bounding_box(), seen.page.viewport_size
            assert box is not None and window is not None
            assert box["x"] >= 0 and box["x"] + box["width"] <= window["width"]
