"""The limits of this machine, measured on photographs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import cli, last_line
from conftest import write_shards

from pipeline import bench, config
from pipeline.errors import SourceError
from pipeline.report import terminal


def write_config(folder: Path, source: str) -> Path:
    """ResNet-18 on small pictures; the output does not exist."""
    raw = {
        "source": {"url": source, "label": "cls"},
        "backbone": {
            "model": "torchvision/resnet18",
            "weights": "seed:0",
            "nodes": {"embedding": {"node": "flatten"}},
            "preprocess": {"resize": 112, "crop": 96},
        },
        "output": {"url": str(folder / "out")},
        "run": {"batch_size": 8, "optimize": "fold"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def report(shards: Path, folder: Path) -> dict[str, Any]:
    """What `pipeline bench --json` says of 40 photographs."""
    finished = cli("bench", write_config(folder, f"{shards}/*.tar"), "--images", "40", "--json")
    assert finished.returncode == 0, finished.stderr
    assert len(finished.stdout.strip().splitlines()) == 1
    return last_line(finished)


def test_limits_are_positive_and_finite(report: dict[str, Any], folder: Path) -> None:
    assert report["images"]["read"] == 40
    assert report["images"]["unreadable"] == 0
    rates = [report[name]["images_per_s"] for name in ("storage", "limit", "end_to_end")]
    rates += [report["storage"]["bytes_per_s"], *(row["images_per_s"] for row in report["forward"]["programs"])]
    rates += [rate for decode in ("exact", "fast") for rate in report["decode"][decode].values()]
    rates += [value for row in report["training_machinery"]["modes"].values() for value in row.values()]
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)
    assert {row["program"] for row in report["forward"]["programs"]} == {"eager", "batchnorm folded"}
    assert report["rounds"] == 3
    assert report["training_machinery"]["passes"] == 5
    assert not (folder / "out").exists()


def test_limit_is_what_decoding_and_forward_pass_leave(report: dict[str, Any]) -> None:
    limit = report["limit"]["images_per_s"]
    assert limit <= 1.3 * report["decode"]["exact"]["pictures_per_s"]
    assert limit <= 1.3 * max(row["images_per_s"] for row in report["forward"]["programs"])
    run = report["end_to_end"]
    assert run["images_per_s"] <= 1.3 * limit
    assert 0 < run["share_of_limit"] <= 1.3
    assert run["bound_by"] in {"fetch", "decode", "forward", "write", "starved"}
    assert set(run["busy"]) == {"fetch", "decode", "forward", "write"}
    assert all(0 <= share <= 1 for share in run["busy"].values())


def test_gradients_cost_memory(report: dict[str, Any]) -> None:
    modes = report["training_machinery"]["modes"]
    assert not report["training_machinery"]["failed"]
    frozen = modes["eval mode, inference_mode"]
    assert (frozen["seconds_ratio"], frozen["memory_ratio"]) == (1, 1)
    for mode in ("train mode, grad", "eval mode, grad"):
        assert modes[mode]["peak_bytes"] > 1.3 * frozen["peak_bytes"]


def test_people_get_tables(report: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_bench(report)
    lines = capsys.readouterr().out.splitlines()
    for start in ("storage", "decode: exact", "forward: eager", "end to end", "busy", "train mode, grad", "medians"):
        assert sum(line.startswith(start) for line in lines) == 1


@pytest.mark.parametrize(("mistake", "reason"), [("no/such/*.tar", "no such file"), ("shards/*.tar", "none of the first 2")])
def test_without_pictures_there_is_nothing_to_measure(mistake: str, reason: str, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", [b"not a picture", b"nor this"], 1)
    wanted = config.load(write_config(tmp_path, f"{tmp_path}/{mistake}"))
    with pytest.raises(SourceError, match=reason):
        bench.measure(wanted, 10, print)


def test_mistakes_are_one_line(shards: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, f"{shards}/*.tar")
    finished = cli("bench", path, "--set", "decode=quick")
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert "decode" in line
    assert "exact, fast" in line
    assert not finished.stdout
