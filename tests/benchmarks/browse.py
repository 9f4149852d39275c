"""How long the pages of `pipeline browse` take on a large dataset. A command of its own, pytest does not run it.

    python tests/benchmarks/browse.py [--rows 1000000] [--dim 512] [--repeats 5] [--folder DIR] [--json]

The dataset is that of `report.py`. The server is a process of its own on this machine; a page is asked for over HTTP, the way a
browser does, and then all its pictures, six at a time. Another row is asked for each time.

    rows       48 rows at random, their pictures
    filter     the same of one label of 1,000, which is looked for in all rows
    search     the neighbours of a row among all rows
    filtered   the same among the rows of 100 labels of 1,000
    cold       `search` after the pages of all partitions were dropped from the page cache (`POSIX_FADV_DONTNEED`)

`page` is the time to the page, `whole` to its last picture. `peak` is the largest resident set of the server, pages of mapped
files included. The goal: the page of a search in below 2 s, cold or warm. Linux only.
"""

from __future__ import annotations

import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from export import CACHES, MB, parsed
from memory import ROOT, circumstances, save
from report import make

from pipeline.browse import cookie_of

GOAL = {"search_s": 2.0}
CONNECTIONS = 6
"""Of a browser to one host."""


class Client:
    """A browser without a window: it has the token, and asks for what a page shows."""

    def __init__(self, address: str) -> None:
        self._origin, _, token = address.partition("/?token=")
        self._headers = {"Cookie": f"{cookie_of(token)}={token}"}

    def get(self, path: str) -> bytes:
        """The body of an answer."""
        with urllib.request.urlopen(urllib.request.Request(self._origin + path, headers=self._headers)) as answer:
            body: bytes = answer.read()
            return body

    def look(self, path: str) -> tuple[float, float]:
        """Seconds to the page, and to its last picture."""
        start = time.perf_counter()
        page = self.get(path).decode()
        seconds = time.perf_counter() - start
        pictures = re.findall(r'src="(/pictures/\d+)"', page)
        assert len(pictures) >= 40, page
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            assert all(body[:2] == b"\xff\xd8" for body in pool.map(self.get, pictures))
        return seconds, time.perf_counter() - start


def main() -> None:
    arguments = parsed("Measure the pages of `pipeline browse`.")
    if arguments.child:
        make(arguments.child, arguments.rows, arguments.dim)
        return
    out = sys.stderr if arguments.json else sys.stdout
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="browse-", dir=arguments.folder) as name:
        options = ["--rows", str(arguments.rows), "--dim", str(arguments.dim), "--child", f"{name}/made"]
        subprocess.run([sys.executable, __file__, *options], check=True)
        dataset = Path(name, "made", "dataset")
        partitions = sorted((dataset / "data").iterdir())
        command = [sys.executable, "-u", "-m", "pipeline", "browse", str(dataset)]
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            client = Client([server.stdout.readline() for _ in range(3)][1].strip())
            for number in range(arguments.repeats + 1):
                row = number * arguments.rows // (arguments.repeats + 1)
                some = urllib.parse.urlencode({"where": f"label=class {number}"})
                many = urllib.parse.urlencode({"where": "label<class 189"})  # as text, of class 0 to class 999
                looks = {
                    "rows": f"/?seed={number}",
                    "filter": f"/?{some}",
                    "search": f"/rows/{row}",
                    "filtered": f"/rows/{row + 1}?{many}",
                    "cold": f"/rows/{row + 2}",
                }
                for what, path in looks.items():
                    CACHES["cold" if what == "cold" else "warm"](partitions)
                    seconds = client.look(path)
                    if number:  # the first of each warms up
                        found.setdefault(what, []).append(seconds)
            status = Path(f"/proc/{server.pid}/status").read_text()
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)
    peak = 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])
    lines: list[dict[str, Any]] = []
    print(f"{'what':<9} {'page s':>7} {'(min - max)':>13} {'whole s':>8}", file=out)
    for what, times in found.items():
        pages, wholes = zip(*times, strict=True)
        lines.append(
            {"what": what, "page_s": statistics.median(pages), "page_s_range": [min(pages), max(pages)],
             "whole_s": statistics.median(wholes), "whole_s_range": [min(wholes), max(wholes)]}
        )  # fmt: skip
        middle = f"{lines[-1]['page_s']:7.2f} ({min(pages):5.2f} -{min(9999, max(pages)):5.2f})"
        print(f"{what:<9} {middle} {lines[-1]['whole_s']:8.2f}", file=out)
    print(f"peak {peak / MB:.0f} MB", file=out)
    searches = [line for line in lines if line["what"] in ("search", "filtered", "cold")]
    met = {"search_s": all(line["page_s_range"][1] < GOAL["search_s"] for line in searches)}
    print(f"goal: search_s {'met' if met['search_s'] else 'MISSED'}", file=out)
    report = {
        "benchmark": "browse",
        "goal": GOAL,
        "met": met,
        **circumstances(arguments.repeats, "every page once", ("pyarrow", "deltalake", "starlette", "uvicorn")),
        "rows": arguments.rows,
        "dim": arguments.dim,
        "results": lines,
        "peak_bytes": peak,
    }
    save(report, arguments.out, out)
    if arguments.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
