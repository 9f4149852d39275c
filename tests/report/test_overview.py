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
from browser import RIGHTMOST, chromium, shown
from conftest import crops, settings, tar_bytes
from datasets import write_dataset
from names import NAMES, SHOWN
from playwright.sync_api import Browser
from quick import committed
from sklearn.decomposition import PCA
from test_probe_section import CURVE, metrics

from pipeline import reports
from pipeline.dataset.read import Dataset
from pipeline.report import overview, pictures, plane, sample
from pipeline.report.overview import Record

GOOD = len(NAMES)
COLORS = {"light": "rgb(78, 121, 167)", "dark": "rgb(120, 166, 216)"}
"""Of a point of the first group."""
SPREAD = """each => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [each.naturalWidth, each.naturalHeight];
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.drawImage(each, 0, 0);
  return [10, canvas.height - 10].map(row => {
    const values = context.getImageData(0, row, canvas.width, 1).data.filter((_, place) => place % 4 < 3);
    return Math.max(...values) - Math.min(...values);
  });
}"""
"""How far the values of a picture's 10th row are apart, and those of its 10th row from below."""
BAD_KEYS = ["<b>broken</b>", "\u202ebroken"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Eight pictures, two that cannot be decoded, and a probe of classes with the same names."""
    folder = tmp_path_factory.mktemp("hostile")
    images = [*crops(GOOD, size=(160, 100)), b"no picture", b"no picture either"]
    names, labels = [*NAMES, *BAD_KEYS], [*NAMES[::-1], "x", "y"]
    columns = {"image": images, "name": names, "class": labels, "caption": [f"of {name}" for name in names]}
    pq.write_table(pa.table(columns), folder / "a.parquet", compression="none")
    source = {"source__image": "image", "source__key": "name", "source__label": "class", "source__columns": ["caption"]}
    dataset = committed(settings(folder / "a.parquet", folder / "out", **source))
    probe = folder / "out" / "_runs" / "20261124T120000Z-abcdef" / "probe"
    probe.mkdir(parents=True)
    few = metrics(GOOD, CURVE) | {"version": 0, "classes": NAMES, "warnings": ["<b>warned</b>"]}
    (probe / "metrics.json").write_text(json.dumps(few))
    return dataset


@pytest.fixture(scope="module")
def page(hostile: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    reports.write(hostile, None, str(file))
    return file


def words(page: Path, browser: Browser) -> str:
    """The text of a page that is seen, with single spaces."""
    with shown(browser, page) as seen:
        return " ".join(seen.page.locator("body").inner_text().split())


def test_whatever_comes_from_data_is_shown_as_text(browser: Browser, page: Path) -> None:
    with shown(browser, page) as seen:
        text = seen.page.evaluate("document.body.textContent")
        tags = set(seen.page.evaluate("[...document.querySelectorAll('*')].map(each => each.localName)"))
        names = set(seen.page.evaluate("[...document.querySelectorAll('*')].flatMap(each => each.getAttributeNames())"))
        assert (seen.requests, seen.messages) == ([], [])
    assert not [name for name in names if name.startswith("on")]
    for name in [*NAMES, *BAD_KEYS, "<b>warned</b>"]:
        assert SHOWN.get(name, name).replace("\u202e", r"\u202e") in text
    assert not tags & {"script", "iframe", "object", "embed", "link", "a", "form", "image", "foreignObject", "b"}
    html = page.read_text()
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00\x1b]", html)
    assert html.count('<img src="data:image/jpeg;base64,') == html.count("<img ")


@pytest.mark.parametrize(("size", "scheme"), list(itertools.product(("desktop", "phone"), ("light", "dark"))))
def test_it_fits_the_window_and_asks_for_nothing(browser: Browser, page: Path, size: str, scheme: str) -> None:
    with shown(browser, page, size, scheme) as seen:
        width, overflow = seen.page.evaluate("[innerWidth, document.documentElement.scrollWidth]")
        assert overflow <= width
        assert seen.page.evaluate(RIGHTMOST) <= width
        background, color = seen.page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        point = seen.page.evaluate("getComputedStyle(document.querySelector('.map path[fill=\"var(--c0)\"]')).fill")
        assert (seen.requests, seen.messages) == ([], [])
    light, dark = (sum(map(int, re.findall(r"\d+", each)[:3])) for each in (background, color))
    assert (light > dark) == (scheme == "light"), "the page is light, or it is dark"
    assert point == COLORS[scheme]


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


def test_quarantine_by_kind_and_neighbours_in_order(browser: Browser, hostile: Dataset, page: Path) -> None:
    text = words(page, browser)
    assert re.search(r"2 samples could not be embedded .* decode NotAnImage 2 <b>broken</b> in a\.parquet: ", text)
    embeddings = hostile.to_numpy()
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    with shown(browser, page) as seen:
        rows = [
            (query.locator("h2").inner_text(), query.locator(".strip code").all_inner_texts())
            for query in seen.page.locator(".query").all()
            if query.locator("figcaption .muted").first.inner_text() == "row"
        ]
    assert len(rows) == overview.QUERIES
    shown_names = [SHOWN.get(name, name) for name in NAMES]
    for key, neighbours in rows:
        row = shown_names.index(key)
        order = [other for other in np.argsort(-(unit @ unit[row]), kind="stable") if other != row]
        assert neighbours == [shown_names[other] for other in order]


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_what_is_in_quarantine_is_seen_where_there_is_anything_to_see(browser: Browser, tmp_path: Path, form: str) -> None:
    images = crops(4, size=(160, 100))
    cut = images[3][: len(images[3]) * 2 // 3]
    names, bad = ["a", "b", "c", "cut", "none"], [cut, b"no picture"]
    if form == "tar":
        file = tmp_path / "a.tar"
        file.write_bytes(tar_bytes({f"{name}.jpg": image for name, image in zip(names, [*images[:3], *bad], strict=True)}))
        dataset = committed(settings(file, tmp_path / "out", source__label=None))
        expected = ["cut"]
    else:
        file = tmp_path / "a.parquet"
        table = pa.table({"image": [*images[:3], *bad, images[3]], "name": [*names, "b"]})
        pq.write_table(table, file, compression="none")
        columns = {"source__image": "image", "source__key": "name", "source__label": None}
        dataset = committed(settings(file, tmp_path / "out", **columns))
        expected = ["b", "cut"]
    reports.write(dataset, None, str(tmp_path / "page.html"))
    with shown(browser, tmp_path / "page.html") as seen:
        examples = {each.locator("code").inner_text(): each.locator("img") for each in seen.page.locator(".example").all()}
        assert sorted(key for key, picture in examples.items() if picture.count()) == expected
        assert len(examples) == len(expected) + 1
        sides = examples["cut"].evaluate("each => [each.naturalWidth, each.naturalHeight]")
        assert sides == [pictures.SMALL_SIDE, 90]
        # The upper part is the photograph, the lower one is what libjpeg fills in.
        rows = examples["cut"].evaluate(SPREAD)
        assert rows[0] > 20 > rows[1]
        assert (seen.requests, seen.messages) == ([], [])
    # Another image in its place is not shown as the one that failed.
    file.write_bytes(file.read_bytes().replace(cut, images[2][: len(cut)].ljust(len(cut)), 1))
    reports.write(dataset, None, str(tmp_path / "later.html"))
    with shown(browser, tmp_path / "later.html") as seen:
        assert seen.page.locator(".example img").count() == len(expected) - 1


def test_no_more_pictures_than_a_page_may_have(hostile: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports.write(hostile, None, str(tmp_path / "all.html"))
    monkeypatch.setattr(pictures, "MAX_BYTES", 10_000)
    reports.write(hostile, None, str(tmp_path / "some.html"))
    everything, some = ((tmp_path / name).read_text() for name in ("all.html", "some.html"))
    assert (
        1 <= len(set(re.findall(r"data:image/[^\"]*", some))) < len(set(re.findall(r"data:image/[^\"]*", everything))) == GOOD
    )
    assert "no picture: the page has as many as it may" in some
    monkeypatch.setattr(pictures, "MAX_SECONDS", 0.0)
    reports.write(hostile, None, str(tmp_path / "none.html"))
    assert "data:image/" not in (tmp_path / "none.html").read_text().partition("<main>")[2]


def test_long_texts_do_not_make_a_long_page(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)
    texts = [f"{number}" + "\u202e" * 2000 for number in range(60)]
    columns = {f"c{number}": texts for number in range(20)}
    dataset = write_dataset(tmp_path / "out", rows, texts, keys=texts, columns=columns)
    reports.write(dataset, None, str(tmp_path / "page.html"))
    tiles = overview.QUERIES * (1 + overview.NEIGHBOURS) + reports.OUTLIERS
    assert (tmp_path / "page.html").stat().st_size < tiles * 6 * 6 * 110 + 100_000


@pytest.mark.parametrize("shape", [(300, 40), (40, 300)])
def test_the_axes_are_the_principal_ones(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    scales = np.r_[9, 4, np.linspace(2, 0.1, shape[1] - 2)].astype(np.float32)
    features = random.standard_normal(shape, np.float32) * scales + 3
    places, shares = plane.plane(features)
    exact = PCA(2, svd_solver="full").fit(features)
    np.testing.assert_allclose(shares, exact.explained_variance_ratio_, rtol=1e-3)
    for ours, theirs in zip(places.T, exact.transform(features).T, strict=True):
        assert abs(np.corrcoef(ours, theirs)[0, 1]) > 0.9999
        assert ours.max() == np.abs(ours).max()


def test_embeddings_without_any_direction(tmp_path: Path) -> None:
    for number, rows in enumerate((np.ones((5, 3)), np.zeros((5, 1)), np.ones((1, 2)), np.full((4, 2), 3e38))):
        dataset = write_dataset(tmp_path / str(number), rows.astype(np.float32))
        reports.write(dataset, None, str(tmp_path / "page.html"))
        assert ("<h2>Map</h2>" in (tmp_path / "page.html").read_text()) == (len(rows) > 1)


def test_colours_by_label_and_else_by_shard(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    labels = [
        [number % 3 for number in range(120)],
        [f"class {number % 12}" for number in range(117)] + [None] * 3,
        random.permutation(120).astype(float).tolist(),
        None,
    ]
    found = []
    for number, each in enumerate(labels):
        rows = random.standard_normal((120, 4)).astype(np.float32)
        dataset = write_dataset(tmp_path / str(number), rows, each, rows_per_shard=8)
        drawn = plane.draw(sample.draw(dataset, "embedding"), pictures.Pictures(dataset, lambda image: image))
        assert sum(group.num_rows for group in drawn.groups) == 120
        for group in drawn.groups:
            assert str(drawn.chart).count(f'fill="var(--c{group.color})"') == group.num_rows
        found.append((drawn.by, [group.name for group in drawn.groups]))
    assert found[0] == ("label", ["0", "1", "2"])
    assert found[1] == ("label", [*(f"class {number}" for number in range(9)), "4 others"])
    assert found[2][0] == "label" and found[2][1][0] == "0 … 13"
    assert found[3][0] == "shard" and found[3][1][0] == "00000.tar … 00001.tar" and len(found[3][1]) == 9


def test_a_sample_of_a_large_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).standard_normal((1000, 4)).astype(np.float32)
    rows[30] = np.nan
    dataset = write_dataset(tmp_path / "out", rows, list(range(1000)), rows_per_shard=90)
    whole = sample.draw(dataset, "embedding", 100)
    assert [row["label"] for row in whole.rows] == [number for number in range(0, 1000, 10) if number != 30]
    assert whole.how == "100 of 1,000 rows, at equal distances; 1 with values that are not finite are left out"
    np.testing.assert_array_equal(whole.features, rows[whole.positions])
    monkeypatch.setattr(sample, "SPREAD_BYTES", 1000)
    monkeypatch.setattr(overview, "SPREAD_BYTES", 1000)
    stretches = sample.draw(dataset, "embedding", 120)
    assert stretches.how == "120 of 1,000 rows, from 60 places at equal distances"
    assert stretches.positions[[0, 1, -2, -1]].tolist() == [0, 1, 998, 999]
    page = overview.overview(dataset, stretches, Record(run={}), [], lambda image: image)
    assert "among the sample, since there are more rows than a page should read" in page


def test_umap_keeps_what_is_near(tmp_path: Path) -> None:
    """Three clouds that no two axes tell apart: in their plane the nearest of each point are of its cloud."""
    random = np.random.default_rng(0)
    centres = np.repeat(np.eye(3, 30, k=5, dtype=np.float32) * 4, 40, axis=0)
    rows = np.concatenate([centres, np.zeros((120, 30), np.float32)], axis=1)
    rows[:, 30:] = random.standard_normal((120, 1)) * 20  # most of the variance says nothing
    rows += random.standard_normal(rows.shape).astype(np.float32) * 0.3
    places = plane.neighbourhoods(rows[:, :30])
    apart = np.linalg.norm(places[:, None] - places[None], axis=2) + np.eye(120) * 1e9
    assert (apart.argmin(axis=1) // 40 == np.arange(120) // 40).all()
    dataset = write_dataset(tmp_path / "out", rows, [number // 40 for number in range(120)])
    reports.write(dataset, None, str(tmp_path / "page.html"), method="umap")
    assert "embedding by UMAP, which keeps near rows near" in (tmp_path / "page.html").read_text()
