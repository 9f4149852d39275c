"""The page of two versions side by side, in a real browser: rows that came, went and changed, under names that mean no good."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import chromium, shown
from commands import invoke, last_line
from conftest import crops, settings
from names import NAMES, SHOWN
from playwright.sync_api import Browser

import pipeline
from pipeline import driver

IMAGES = [*crops(18, size=(160, 100)), *crops(8, size=(160, 100), seed=7)]
COLUMNS = {"source__image": "image", "source__key": "name", "source__label": "class", "run__max_removed": 0.9}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """Of ten plain rows one goes, one changes, and one cannot be decoded any more; eight with evil names come."""
    folder = tmp_path_factory.mktemp("comparison")

    def write(name: str, images: list[bytes], names: list[str]) -> None:
        (folder / "shards").mkdir(exist_ok=True)
        classes = [f"class {int(number) % 2}" if number.isdigit() else number for number in names]
        table = pa.table({"image": images, "name": names, "class": classes})
        pq.write_table(table, folder / "shards" / f"{name}.parquet", compression="none")

    plain = [str(number) for number in range(10)]
    write("a", IMAGES[:10], plain)
    driver.run(settings(f"{folder}/shards/*.parquet", folder / "out", **COLUMNS))
    write("a", [IMAGES[17], *IMAGES[1:8], b"no picture"], plain[:9])
    write("b", IMAGES[18:], NAMES)
    driver.run(settings(f"{folder}/shards/*.parquet", folder / "out", **COLUMNS))
    return folder / "out"


@pytest.fixture(scope="module")
def page(output: Path) -> Path:
    finished = invoke("report", output, "0", "1", "--to", output.parent / "compared.html", "--json")
    assert finished.returncode == 0, finished.stderr
    report = last_line(finished)
    assert (report["before"], report["version"], report["page"]) == (0, 1, str(output.parent / "compared.html"))
    return output.parent / "compared.html"


@pytest.mark.parametrize(("size", "scheme"), list(itertools.product(("desktop", "phone"), ("light", "dark"))))
def test_both_versions_in_any_window(browser: Browser, page: Path, size: str, scheme: str) -> None:
    with shown(browser, page, size, scheme) as seen:
        width, overflow = seen.page.evaluate("[innerWidth, document.documentElement.scrollWidth]")
        assert overflow <= width
        text = " ".join(seen.page.locator("body").inner_text().split())
        strips = [
            (card.locator("h2").first.inner_text(), card.locator(".strip code").all_inner_texts())
            for card in seen.page.locator(".card").all()
            if card.locator(".strip").count()
        ]
        points = [each.locator("path[fill]").count() for each in seen.page.locator(".map").all()]
        assert (seen.requests, seen.messages) == ([], [])
    assert strips == [
        ("Added", [SHOWN.get(name, name) for name in NAMES]),
        ("Removed", ["8", "9"]),
        ("Farthest in embedding", ["0"]),
    ]
    assert "10 → 16: 8 added, 2 removed, 1 changed, 0 relabelled, 7 unchanged" in text
    assert re.search(r"version 0 version 1 rows 10 16 ", text)
    assert re.search(r"quarantined 0 1 ", text)
    assert "decode NotAnImage 0 1" in text
    assert len(points) == 2 and points[0] >= 10 and points[1] >= 16


def test_names_are_text(browser: Browser, page: Path) -> None:
    with shown(browser, page) as seen:
        text = seen.page.evaluate("document.body.textContent")
        tags = set(seen.page.evaluate("[...document.querySelectorAll('*')].map(each => each.localName)"))
    for name in NAMES:
        assert SHOWN.get(name, name).replace("\u202e", r"\u202e") in text
    assert not tags & {"script", "iframe", "object", "embed", "link", "a", "form", "image", "foreignObject", "b"}


def test_another_recipe(browser: Browser, output: Path, tmp_path: Path) -> None:
    """Maps of their own, and what differs in the recipe."""
    source = f"{output.parent}/shards/*.parquet"
    nodes = {"backbone__nodes": {"embedding": {"node": "flatten"}}, "decode": "fast"}
    driver.run(settings(source, tmp_path / "out", **COLUMNS))
    driver.run(settings(source, tmp_path / "out", **COLUMNS, **nodes))
    finished = invoke("report", tmp_path / "out", "0", "1", "--to", tmp_path / "page.html")
    assert finished.returncode == 0, finished.stderr
    html = (tmp_path / "page.html").read_text()
    assert "embeddings of different recipes have no place in common" in html
    assert "<h3>In the recipe</h3>" in html and "exact -&gt; fast" in html


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["0"], "two versions are compared by `pipeline report OUTPUT A B --to FILE`"),
        (["0", "1"], "two versions are compared by `pipeline report OUTPUT A B --to FILE`"),
        (["0", "7", "--to", "page.html"], "there is no version 7"),
        (["0", "1", "--to", "page.html", "--version", "1"], "without --version"),
        (["0", "1", "--to", "page.html", "--node", "x"], "there is no embedding column 'x'"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(output: Path, arguments: list[str], message: str) -> None:
    finished = invoke("report", output, *arguments, "--json")
    assert finished.returncode == 2
    assert message in last_line(finished)["error"]


def test_the_pages_of_a_notebook(output: Path) -> None:
    drawn = pipeline.plot_map(pipeline.open_dataset(str(output)))
    assert drawn.html.count('class="spot ') == 16
