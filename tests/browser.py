"""A real browser, and what happened in it while it showed a page."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
RIGHTMOST = "Math.max(0, ...[...document.querySelectorAll('.stacked td')].map(each => each.getBoundingClientRect().right))"
"""Where the cells end of tables that nobody should have to scroll sideways."""


@dataclass
class Shown:
    """A page that is shown."""

    page: Page
    requests: list[str] = field(default_factory=list)
    """URLs, but for the page's own and the data within it."""
    messages: list[str] = field(default_factory=list)
    """Of the console, errors, and dialogs."""


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Headless Chromium; installed from Debian where it is missing."""
    path = shutil.which("chromium")
    if path is None:
        subprocess.run(["apt-get", "update", "-q"], check=True)
        subprocess.run(["apt-get", "install", "-q", "-y", "--no-install-recommends", "chromium"], check=True)
        path = shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def shown(browser: Browser, file: Path, size: str = "desktop", scheme: str = "light") -> Iterator[Shown]:
    """A file as a browser window shows it."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    found = Shown(page)

    def requested(url: str) -> None:
        if not url.startswith("data:") and url != file.as_uri():
            found.requests.append(url)

    page.on("request", lambda request: requested(request.url))
    page.on("console", lambda message: found.messages.append(message.text))
    page.on("pageerror", lambda error: found.messages.append(str(error)))
    page.on("dialog", lambda dialog: (found.messages.append(dialog.message), dialog.dismiss()))
    page.goto(file.as_uri())
    yield found
    context.close()
