"""What a run tells its cluster while it lasts: metrics that Prometheus scrapes, and log lines that name run and shard."""

from __future__ import annotations

import collections
import json
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray
from commands import ROOT
from conftest import noise, settings, shard_members, tar_bytes, write_shards

from pipeline import driver
from pipeline.errors import IncompleteRun
from pipeline.extract.telemetry import COUNTERS, GAUGES, STAGE_SECONDS
from pipeline.plan import Plan

NUM_SHARDS, PER_SHARD = 6, 10
EXPORTED_WITHIN_S = 45.0
"""Ray collects every 10 s."""

Samples = dict[str, list[tuple[dict[str, str], float]]]
"""Name of a metric to labels and values."""


class Scraper:
    """An observer that scrapes the node when all shards are done, until it finds what is there in the end."""

    def __init__(self, wanted: dict[str, float]) -> None:
        self._wanted, self._num_left = wanted, 0
        self.samples: Samples = {}

    def started(self, run_id: str) -> None: ...

    def planned(self, plan: Plan) -> None:
        self._num_left = len(plan.extract)

    def note(self, text: str) -> None: ...

    def finished(self, result: Any, num_actors: int) -> None:
        self._num_left -= 1
        deadline = time.monotonic() + EXPORTED_WITHIN_S
        while not self._num_left and time.monotonic() < deadline:
            self.samples = scraped()
            if self._wanted.items() <= totals(self.samples).items():
                break
            time.sleep(0.5)


def scraped() -> Samples:
    """What the node exports of this package, in Prometheus' text format."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    found: Samples = collections.defaultdict(list)
    for name, labels, value in re.findall(r"^ray_(pipeline_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        found[name].append((dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)))
    return found


def totals(samples: Samples) -> dict[str, float]:
    """Over all that has the newest run's id: other runs of this process may have left something."""
    newest = max((labels["run_id"] for each in samples.values() for labels, _ in each), default="")
    return {name: sum(value for labels, value in each if labels["run_id"] == newest) for name, each in samples.items()}


@pytest.mark.usefixtures("local_ray")
def test_a_running_job_can_be_scraped(tmp_path: Path) -> None:
    images = noise(NUM_SHARDS * PER_SHARD)
    images[23] = b"not a picture"
    write_shards(tmp_path / "shards", images, PER_SHARD, "png")
    num_bytes = sum(path.stat().st_size for path in (tmp_path / "shards").iterdir())
    wanted = {
        "pipeline_images_total": len(images) - 1,
        "pipeline_quarantined_total": 1,
        "pipeline_bytes_total": num_bytes,
        "pipeline_shards_total": NUM_SHARDS,
    }
    scraper = Scraper(wanted)
    summary = driver.run(settings(f"{tmp_path}/shards/*.tar", tmp_path / "out"), observer=scraper)
    (actor,) = summary.actors
    of_this_run = {
        name: [(labels, value) for labels, value in each if labels["run_id"] == summary.run_id]
        for name, each in scraper.samples.items()
    }
    for name, value in wanted.items():
        assert [(labels["node"], found) for labels, found in of_this_run[name]] == [(actor["node"], value)], name
    seconds = {labels["stage"]: value for labels, value in of_this_run[STAGE_SECONDS]}
    for stage, value in summary.stages.items():
        assert seconds[stage] == pytest.approx(value, abs=1e-3), stage
    assert of_this_run.keys() <= {*COUNTERS, *GAUGES, STAGE_SECONDS}
    assert of_this_run.keys() >= GAUGES.keys()
    ours = {"run_id", "node", "stage"}
    for each in of_this_run.values():
        for labels, _ in each:
            assert not any("tar" in value for name, value in labels.items() if name in ours)


def test_the_dashboard_shows_what_there_is() -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    shown = set(re.findall(r"ray_(pipeline_\w+)", json.dumps([dashboard["panels"], dashboard["templating"]])))
    assert shown <= {*COUNTERS, *GAUGES, STAGE_SECONDS}
    assert shown >= {*GAUGES, STAGE_SECONDS, "pipeline_images_total", "pipeline_bytes_total", "pipeline_quarantined_total"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@pytest.mark.usefixtures("local_ray")
def test_lines_of_actors_name_run_and_shard(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", noise(20), 10, "png")
    (tmp_path / "shards" / "broken.tar").write_bytes(b"<html>no tar</html>" * 100)
    (tmp_path / "shards" / "twice.tar").write_bytes(tar_bytes(shard_members(noise(10), 100)))
    with pytest.raises(IncompleteRun) as raised:
        driver.run(settings(f"{tmp_path}/shards/*.tar", tmp_path / "out"))
    summary = raised.value.summary  # type: ignore[attr-defined]
    (actor,) = summary.actors
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    (log,) = logs.glob(f"worker-*-{actor['pid']}.err")
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert {(line["run_id"], line["node"]) for line in lines} == {(summary.run_id, actor["node"])}
    said = {Path(line["shard"]).name: (line["level"], line["message"]) for line in lines if "shard" in line}
    assert said.keys() == {"000.tar", "001.tar", "twice.tar", "broken.tar"}
    assert said["001.tar"] == ("INFO", "done: 10 rows, 0 samples in quarantine")
    level, message = said["broken.tar"]
    assert level == "WARNING"
    assert message.startswith("failed: ShardError: ")
