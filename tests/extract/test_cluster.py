"""A GPU of the cluster lent to a function, on a local Ray whose GPU is only a number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT

from pipeline.errors import ConfigError
from pipeline.extract import cluster

SCRIPT = """
import json, os
import ray
from lent import describe, ends, refuses
from pipeline import config, driver
from pipeline.errors import ConfigError, WorldError
from pipeline.extract import cluster

ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
found = {{"here": os.getpid(), "there": cluster.on_gpu(describe, "word")}}
for name, function, kind in (("refused", refuses, ConfigError), ("dead", ends, WorldError)):
    try:
        cluster.on_gpu(function)
    except kind as error:
        found[name] = str(error)
output = config.Output(url={output!r})
found["probe"] = driver.train_probe(output, None, config.Probe(normalize="none", split="part"))
with open("found.json", "w") as file:  # Ray writes to stdout as well
    json.dump(found, file)
"""
LENT = """
import os
from pipeline.errors import ConfigError

def describe(word):
    return [os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"], word]

def refuses():
    raise ConfigError("field: value: what is allowed")

def ends():
    os._exit(1)
"""


def test_a_function_runs_on_a_gpu_of_the_cluster(embedded: str, tmp_path: Path) -> None:
    (tmp_path / "lent.py").write_text(LENT)
    script = SCRIPT.format(output=embedded)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=200, cwd=tmp_path, env=environment
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    pid, visible, word = found["there"]
    assert pid != found["here"]
    assert (visible, word) == ("0", "word")
    assert found["refused"] == "field: value: what is allowed", "errors arrive as what they are"
    assert found["dead"].startswith("what ran on a GPU of the cluster died: ")
    metrics = json.loads(Path(embedded, found["probe"]["path"], "metrics.json").read_text())
    assert metrics["test_accuracy"] == found["probe"]["test_accuracy"] > 0.3


def test_without_a_gpu_it_runs_here(local_ray: None) -> None:
    assert cluster.on_gpu(os.getpid) == os.getpid()
    with pytest.raises(ConfigError, match="mine"):
        cluster.on_gpu(_refuses, "mine")


def _refuses(text: str) -> None:
    raise ConfigError(text)
