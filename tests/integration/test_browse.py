"""`pipeline browse` as a person uses it: the command in a process of its own, its pages in a real browser."""

from __future__ import annotations

import itertools
import re
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import RIGHTMOST, SIZES, chromium
from commands import invoke, start
from conftest import crops, settings
from names import NAMES, SHOWN
from playwright.sync_api import Browser, Page
from quick import committed

import pipeline
from pipeline.browse import cookie_of

IMAGES = crops(68, size=(160, 100))
PLAIN = [f"row {number}" for number in range(60)]


@dataclass(frozen=True)
class Served:
    """A server, and what it serves."""

    address: str
    """With the token."""
    output: str
    process: subprocess.Popen[str]

    @property
    def origin(self) -> str:
        return self.address.partition("/?")[0]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """60 plain rows, eight with names that mean no good, and two images that cannot be decoded."""
    folder = tmp_path_factory.mktemp("browse")
    names = [*NAMES, *PLAIN, "broken <b>", "cut"]
    classes = [*NAMES[::-1], *(f"class {number % 3}" for number in range(60)), "x", "x"]
    table = pa.table({"image": [*IMAGES, b"none", IMAGES[0][:-2000]], "name": names, "class": classes, "size": list(range(70))})
    pq.write_table(table, folder / "a.parquet", compression="none")
    columns = {"source__image": "image", "source__key": "name", "source__label": "class", "source__columns": ["size"]}
    committed(settings(folder / "a.parquet", folder / "out", **columns))
    process = start("browse", folder / "out", env={"PYTHONUNBUFFERED": "1"})
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        yield Served(lines[1].strip(), str(folder / "out"), process)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    """Let in, and watched: nothing leaves for another address and nothing is complained of."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    outside: list[str] = []
    page.on(
        "request", lambda request: None if request.url.startswith((served.origin, "data:")) else outside.append(request.url)
    )
    page.on("console", lambda message: outside.append(message.text))
    page.on("pageerror", lambda error: outside.append(str(error)))
    page.on("dialog", lambda dialog: (outside.append(dialog.message), dialog.dismiss()))
    page.goto(served.address)
    yield page
    context.close()
    refused = (
        "Failed to load resource: the server responded with a status of 400 (Bad Request)"  # what it says of a mistake's page
    )
    assert [each for each in outside if each != refused] == []


def keys(page: Page) -> list[str]:
    return page.locator(".strip code").all_inner_texts()


def all_pictures_are_there(page: Page) -> bool:
    page.wait_for_load_state("networkidle")
    return bool(page.evaluate("[...document.images].every(each => each.complete && each.naturalWidth > 0)"))


def test_a_click_leads_to_the_neighbours(page: Page, served: Served) -> None:
    assert page.locator(".strip li").count() == 48
    assert "48 of 68 rows, at random" in page.locator("main").inner_text()
    assert all_pictures_are_there(page)
    dataset = pipeline.open_dataset(served.output)
    page.locator(".strip li", has_text="row 7").first.click() if "row 7" in keys(page) else page.goto(
        served.origin + "/rows/15"
    )
    key = page.locator(".query > .tile h2").inner_text()
    embeddings = dataset.to_numpy()
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    row = dataset.keys().index(key)
    order = [other for other in np.argsort(-(unit @ unit[row]), kind="stable") if other != row][:48]
    shown = [SHOWN.get(dataset.keys()[other], dataset.keys()[other]) for other in order]
    assert keys(page) == shown
    assert all_pictures_are_there(page)
    second = keys(page)[0]
    page.locator(".strip li a").first.click()
    assert page.locator(".query > .tile h2").inner_text() == second


def test_an_image_of_ones_own(page: Page, tmp_path: Path) -> None:
    (tmp_path / "mine <i>.jpg").write_bytes(IMAGES[20])
    page.set_input_files("input[type=file]", tmp_path / "mine <i>.jpg")
    page.get_by_role("button", name="Search", exact=True).click()
    assert page.locator(".query > .tile h2").inner_text() == "mine <i>.jpg"
    assert keys(page)[0] == PLAIN[12]
    assert page.locator(".strip .first .number").first.inner_text() == "1.0000"
    (tmp_path / "text.jpg").write_text("no picture")
    page.set_input_files("input[type=file]", tmp_path / "text.jpg")
    page.get_by_role("button", name="Search", exact=True).click()
    assert "text.jpg: not a picture in any of JPEG, PNG" in page.locator("main").inner_text()


def test_a_filter_stays_while_one_looks_around(page: Page) -> None:
    page.fill("input[name=where]", "label=class 1; size>=30")
    page.get_by_role("button", name="Filter").click()
    wanted = {PLAIN[number] for number in range(60) if number % 3 == 1 and number + 8 >= 30}
    assert set(keys(page)) == wanted
    page.locator(".strip li a").first.click()
    assert set(keys(page)) <= wanted and len(keys(page)) == len(wanted) - 1
    page.fill("input[name=where]", "lable=3")
    page.get_by_role("button", name="Filter").click()
    assert "there is no column 'lable' to compare; did you mean label" in page.locator("main").inner_text()


def test_quarantine_and_names_as_text(page: Page, served: Served) -> None:
    page.get_by_role("link", name="Quarantine").click()
    assert "broken <b>" in page.locator("main").inner_text()
    assert "decode NotAnImage 1" in " ".join(page.locator("main").inner_text().split())
    assert page.locator(".example", has_text="cut").locator("img").count() == 1
    assert page.locator(".example img").count() == 1
    assert all_pictures_are_there(page)
    page.goto(served.origin + "/?where=size<8")
    assert sorted(keys(page)) == sorted(SHOWN.get(name, name) for name in NAMES)
    tags = set(page.evaluate("[...document.querySelectorAll('*')].map(each => each.localName)"))
    assert not tags & {"script", "iframe", "object", "embed", "image", "foreignObject", "b"}


@pytest.mark.parametrize(("size", "scheme"), list(itertools.product(SIZES, ("light", "dark"))))
def test_it_fits_the_window(browser: Browser, served: Served, size: str, scheme: str) -> None:
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.goto(served.address)
    for path in ("/", "/rows/3", "/quarantine"):
        page.goto(served.origin + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(RIGHTMOST) <= width
    context.close()


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {}, 403),
        ("/pictures/0", {}, 403),
        ("/?token=guess", {}, 403),
        ("/", {"Cookie": f"{cookie_of('guess')}=guess"}, 403),
        ("TOKEN", {"Host": "rebound.example"}, 400),
        ("/rows/68", "COOKIE", 404),
        ("/rows/x", "COOKIE", 404),
        ("/uploads/none", "COOKIE", 404),
        ("/?where=nothing", "COOKIE", 400),
        ("/quarantine", "COOKIE", 200),
    ],
)
def test_who_is_let_in(served: Served, path: str, headers: dict[str, str] | str, status: int) -> None:
    token = served.address.partition("=")[2]
    if isinstance(headers, str):
        headers = {"Cookie": f"{cookie_of(token)}={token}"}
    address = served.address if path == "TOKEN" else served.origin + path
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as response:
            found, text = response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        found, text = error.code, error.read().decode()
    assert found == status, text
    assert "Traceback" not in text


def test_it_listens_here_alone_and_ends_when_it_is_told(served: Served) -> None:
    port = int(served.origin.rpartition(":")[2])
    listening = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    assert re.findall(rf" ([0-9A-F]+):{port:04X} \S+ 0A ", listening) == ["0100007F"]
    taken = invoke("browse", served.output, "--port", str(port))
    assert taken.returncode == 2
    assert f"error: port: {port}: " in taken.stderr and "Traceback" not in taken.stderr
    process = start("browse", served.output, env={"PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    assert "version 0, 68 rows" in process.stdout.readline()
    address = process.stdout.readline().strip()
    assert process.stdout.readline() == "Ctrl-C ends it.\n"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(address.partition("?")[0], timeout=30)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and errors == ""
