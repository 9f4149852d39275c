"""Build the documentation site: `python docs/build.py`, then open `build/docs/site/index.html`.

The pages are the repository's own Markdown files. They are copied to where they lie in the repository, together with every
file that they link to, so that a link that works in one place works in the other. Where a page has the line
`<!-- from the code: NAME -->` it gets what `reference.py` makes of the code. A link that leads nowhere is an error.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import reference

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "deploy/README.md", "docs/**/*.md")
_LINK = re.compile(r"\]\(([^)\s#]+)[^)]*\)")
_GENERATED = re.compile(r"^<!-- from the code: (\w+) -->$", re.MULTILINE)


def pages() -> list[Path]:
    """Every page of the site, relative to the repository."""
    return sorted({path.relative_to(ROOT) for pattern in PAGES for path in ROOT.glob(pattern)})


def links(page: Path) -> list[Path]:
    """The files of the repository that a page links to, relative to it, whether they are there or not."""
    found = []
    for target in _LINK.findall((ROOT / page).read_text()):
        if "://" not in target and not target.startswith("mailto:"):
            found.append((ROOT / page.parent / target).resolve().relative_to(ROOT))
    return found


def stage(to: Path) -> None:
    """Copy the pages, filled, and the files that they link to."""
    for page in pages():
        text = _GENERATED.sub(lambda match: reference.PARTS[match[1]](), (ROOT / page).read_text())
        _place(to / page).write_text(text)
        for target in links(page):
            if target.suffix != ".md" and (ROOT / target).is_file():
                shutil.copy(ROOT / target, _place(to / target))


def build(to: Path) -> int:
    """The site in `to/site`; the exit code of what built it."""
    shutil.rmtree(to, ignore_errors=True)
    stage(to / "pages")
    shutil.copy(ROOT / "docs" / "zensical.toml", to)
    return subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=to, check=False).returncode


def _place(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the documentation site.")
    parser.add_argument("--to", type=Path, default=ROOT / "build" / "docs", help="folder that is made anew")
    sys.exit(build(parser.parse_args().to.resolve()))
