"""When a run makes its page, what is in it, and the command that makes one."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import invoke, last_line
from conftest import crops, noise, settings, write_shards
from datasets import write_dataset

from pipeline import config, driver, reports
from pipeline.config import Output
from pipeline.errors import IncompleteRun


def text(page: str | Path) -> str:
    return " ".join(Path(str(page).removeprefix("file://")).read_text().split())


@pytest.mark.usefixtures("local_ray")
def test_a_run_makes_the_page_of_its_version(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once a version, again for a new probe, and never so that the run fails."""
    write_shards(tmp_path / "shards", crops(24), 12)
    wanted = settings(f"{tmp_path}/shards/*.tar", tmp_path / "out", run__report=True)
    first = driver.run(wanted)
    runs = tmp_path / "out" / "_runs"
    page = runs / first.run_id / "report.html"
    assert first.report == f"file://{page}"
    html = text(page)
    for part in (first.run_id, first.recipe_id, "24 embedded, 0 carried over, 0 quarantined", "images/s, bound by <strong>"):
        assert part in html
    assert "report" not in json.loads((page.parent / "run.json").read_text())

    assert driver.run(wanted).report is None, "there is one"
    page.unlink()
    assert driver.run(wanted).report == first.report
    assert [each.parent.name for each in runs.glob("*/report.html")] == [first.run_id]

    (tmp_path / "shards" / "001.tar").unlink()
    write_shards(tmp_path / "more", noise(9), 9)
    (tmp_path / "more" / "000.tar").rename(tmp_path / "shards" / "002.tar")
    with caplog.at_level(logging.WARNING), pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vl_convert", None)
        second = driver.run(wanted, allow_removals=True)
    assert second.committed and second.report is None
    (warning,) = caplog.records
    assert warning.getMessage().startswith("the report could not be made: ModuleNotFoundError: ")
    third = driver.run(wanted)
    assert third.report == f"file://{runs}/{second.run_id}/report.html"
    html = text(third.report)
    assert "rows since version 0" in html
    assert "24 → 21: 9 added, 12 removed, 0 changed, 0 relabelled, 12 unchanged" in html
    assert "drift of embedding" in html


@pytest.mark.usefixtures("local_ray")
def test_a_run_that_is_incomplete_shows_what_failed(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", noise(12), 6)
    (tmp_path / "shards" / "bad <i>.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(IncompleteRun) as caught:
        driver.run(settings(f"{tmp_path}/shards/*.tar", tmp_path / "out", run__report=True, run__max_attempts=1))
    summary = caught.value.summary  # type: ignore[attr-defined]
    html = text(summary.report)
    assert "<h2>Failed shards</h2>" in html and "bad &lt;i&gt;.tar" in html
    assert "2 extracted, 1 failed" in html


@pytest.mark.usefixtures("one_thread")
def test_the_probe_of_the_version(embedded: str, tmp_path: Path) -> None:
    probe = driver.train_probe(Output(url=embedded), None, config.Probe(node=["small", "large"]))
    finished = invoke("report", embedded, "--to", tmp_path / "page.html", "--node", "large", "--json")
    assert finished.returncode == 0, finished.stderr
    report = last_line(finished)
    assert report["page"] == str(tmp_path / "page.html")
    assert report["bytes"] == (tmp_path / "page.html").stat().st_size < 10_000_000
    assert (report["version"], report["rows"]) == (0, 260)
    html = text(tmp_path / "page.html")
    assert f"{probe['test_accuracy']:.1%}</span> of the test rows" in html
    low, high = probe["interval"]
    assert f"(95% between {low:.1%} and {high:.1%})" in html
    table = html.partition('<table class="confusion">')[2].partition("</table>")[0]
    counts = [cell.rpartition(">")[2] for cell in table.split("</td>")[:-1]]
    assert sum(int(count) for count in counts if count.isdigit()) == probe["num_test"]
    assert html.count('<tr class="chosen">') == 1
    assert "20 rows have the bytes of an earlier row" in html
    assert "large along its two principal axes" in html


def test_mistakes_are_one_line_and_exit_2(tmp_path: Path) -> None:
    write_dataset(tmp_path / "out", np.eye(4, dtype=np.float32))
    for arguments, message in (
        ([tmp_path / "none"], "there is no dataset yet"),
        ([tmp_path / "out", "--version", "3"], "there is no version 3"),
        ([tmp_path / "out", "--node", "x"], "there is no embedding column 'x'; it has embedding"),
    ):
        finished = invoke("report", *arguments, "--json")
        assert finished.returncode == 2
        assert message in last_line(finished)["error"]
        assert finished.stderr.count("\n") == 1


def test_a_version_of_another_program_has_no_run_to_lie_beside(tmp_path: Path) -> None:
    from deltalake import DeltaTable

    dataset = write_dataset(tmp_path / "out", np.eye(4, dtype=np.float32))
    assert reports.run_of(dataset) == "run 0"
    DeltaTable(str(tmp_path / "out")).alter.set_table_properties({"delta.logRetentionDuration": "interval 30 days"})
    finished = invoke("report", tmp_path / "out")
    assert finished.returncode == 2
    assert "version 1 was committed by another program" in finished.stderr
    assert invoke("report", tmp_path / "out", "--version", "0").returncode == 0
    assert (tmp_path / "out" / "_runs" / "run 0" / "report.html").exists()
