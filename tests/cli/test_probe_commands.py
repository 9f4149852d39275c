"""`pipeline probe` and `pipeline predict` as their user sees them: exit codes, what is printed, what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import cli, last_line
from typer.testing import CliRunner, Result

import pipeline
from pipeline.analysis.probe import head
from pipeline.cli import app

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*words: str | Path) -> Result:
    """The command in this process."""
    return CliRunner().invoke(app, [str(word) for word in words])


def report_of(result: Result) -> dict[str, Any]:
    return dict(json.loads(result.stdout.strip().splitlines()[-1]))


@pytest.fixture
def output(embedded: str, tmp_path: Path) -> Path:
    """A copy to write into."""
    shutil.copytree(embedded, tmp_path / "out", ignore=shutil.ignore_patterns("_runs"))
    return tmp_path / "out"


@pytest.fixture(scope="module")
def probed(embedded: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A copy with a probe on both nodes, and what the command printed."""
    output = tmp_path_factory.mktemp("probed") / "out"
    shutil.copytree(embedded, output, ignore=shutil.ignore_patterns("_runs"))
    return output, run("probe", output, "--node", "all")


def test_what_was_compared_chosen_and_scored_is_shown_and_written(probed: tuple[Path, Result]) -> None:
    output, result = probed
    assert result.exit_code == 0, result.output
    (folder,) = (output / "_runs").iterdir()
    metrics = json.loads((folder / "probe" / "metrics.json").read_text())
    assert len(metrics["compared"]) == 6
    lines = result.stdout.splitlines()
    table = [line.split() for line in lines if line.startswith(("small", "large"))]
    assert [row[:2] for row in table] == [[each["node"], each["normalize"]] for each in metrics["compared"]]
    assert [float(row[3]) for row in table] == pytest.approx(
        [each["validation_accuracy"] for each in metrics["compared"]], abs=1e-4
    )
    (chosen,) = (row for row in table if row[-1] == "chosen")
    assert chosen[:2] == [metrics["node"], metrics["normalize"]]
    shown = {line[:9].strip(): line[11:] for line in lines if line[:9].strip() and not line.startswith(("small", "large"))}
    low, high = metrics["interval"]
    assert shown["probe"].startswith(f"test accuracy {metrics['test_accuracy']:.3f} (95 % between {low:.3f} and {high:.3f}), ")
    assert shown["top-5"] == f"{metrics['test_top5']:.3f}"
    assert shown["per class"].startswith(f"{metrics['mean_per_class_accuracy']:.3f} on average over 10 classes; lowest: ")
    assert shown["NLL, ECE"] == f"{metrics['test_nll']:.4f} nats, {metrics['test_ece']:.4f}"
    assert shown["kNN"].startswith(f"test accuracy {metrics['knn']['test_accuracy']:.3f} with k = {metrics['knn']['k']}")
    assert shown["rows"] == ", ".join(f"{metrics[f'num_{part}']} {part}" for part in ("train", "validation", "test"))
    assert shown["written"] == f"{output}/_runs/{folder.name}/probe"
    weights = head.load((folder / "probe" / "probe.safetensors").read_bytes())
    assert (weights.node, weights.classes) == (metrics["node"], list(range(10)))
    assert weights.weight.shape == (10, metrics["dim"])


def test_status_is_as_before(probed: tuple[Path, Result]) -> None:
    result = run("status", probed[0])
    assert result.exit_code == 0
    assert "260 from 2 shards" in result.stdout


def test_in_a_process_of_its_own_with_groups_a_split_and_a_file(output: Path, tmp_path: Path) -> None:
    rows = pipeline.open_dataset(str(output)).table(["key", "label", "part"]).to_pylist()
    text = "name,digit\n" + "".join(f"{row['key']},{row['label']}\n" for row in rows if row["key"] < "00250") + "unknown,3\n"
    (tmp_path / "labels.csv").write_text(text)
    options = ["--labels", tmp_path / "labels.csv", "--labels-key", "name", "--label", "digit", "--split", "part"]
    finished = cli("probe", output, *options, "--normalize", "zscore", "--normalize", "l2", "--json")
    assert finished.returncode == 0, finished.stderr
    report = last_line(finished)
    assert [each["normalize"] for each in report["compared"]] == ["zscore", "l2"]
    assert (report["num_unlabelled"], report["num_unmatched_keys"]) == (10, 1)
    assert report["num_test"] == sum(row["part"] == "test" for row in rows if row["key"] < "00250")
    assert report["num_copies_left_out"] == 7, "of the ten pictures tested again under other keys, those in train"
    assert "7 rows to train on whose picture is also in a part that scores" in report["warnings"][0]
    assert not {"confusion", "curve", "per_class"} & report.keys()
    assert report["settings"]["labels"].endswith("labels.csv")
    assert (output / report["path"] / "metrics.json").exists()


def test_seed_and_version(output: Path) -> None:
    reports = [
        report_of(run("probe", output, "--normalize", "none", "--seed", seed, "--version", 0, "--json")) for seed in "001"
    ]
    assert reports[0]["test_nll"] == reports[1]["test_nll"] != reports[2]["test_nll"]
    assert {report["version"] for report in reports} == {0}


def test_groups_change_the_split(output: Path) -> None:
    reports = [report_of(run("probe", output, "--normalize", "none", *more, "--json")) for more in ([], ["--group", "patient"])]
    assert [report["settings"]["group"] for report in reports] == [None, "patient"]
    assert reports[0]["test_nll"] != reports[1]["test_nll"]


MISTAKES = [
    (["--label", "breed"], "probe.label: the dataset has no column 'breed'; there are key, label"),
    (["--label", "small"], "probe.label: column 'small' holds list"),
    (["--node", "middle"], "probe.node: the dataset has no embedding column 'middle'; it has small, large, or say all"),
    (
        ["--node", "small", "--node", "small"],
        "pipeline probe: probe.node: ['small', 'small']: name at least one, and none twice",
    ),
    (["--normalize", "l1"], "pipeline probe: probe.normalize: 'l1' is wrong; allowed: none, l2, zscore"),
    (["--group", "camera"], "probe.group: the dataset has no column 'camera'"),
    (["--split", "patient"], "probe.split: column 'patient' holds 'patient 0' (10 rows)"),
    (["--split", "fold"], "probe.split: the dataset has no column 'fold'"),
    (["--labels", "missing.csv"], "probe.labels: "),
    (["--labels", "labels.xlsx"], "pipeline probe: probe.labels: 'labels.xlsx': give the URL of a .csv or .parquet file"),
    (["--version", "7"], "there is no version 7"),
    (["--seed", "-1"], "pipeline probe: probe.seed: -1 is wrong; allowed: a whole number from 0"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[" ".join(options) for options, _ in MISTAKES])
def test_mistakes_are_one_line_and_exit_2(embedded: str, options: list[str], message: str) -> None:
    result = run("probe", embedded, *options, "--json")
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert message in report_of(result)["error"]


def test_no_dataset(tmp_path: Path) -> None:
    for command in ("probe", "predict"):
        result = run(command, tmp_path / "nowhere", "--json")
        assert (result.exit_code, "there is no dataset yet" in result.stderr) == (2, True)


class TestPredict:
    """The second command."""

    def test_the_newest_probe_is_applied(self, probed: tuple[Path, Result], tmp_path: Path) -> None:
        output, _ = probed
        result = run("predict", output, "--to", tmp_path / "new" / "rows.parquet")
        assert result.exit_code == 0, result.output
        table = pq.read_table(tmp_path / "new" / "rows.parquet")
        agree = np.mean(np.array(table.column("predicted")) == np.array(table.column("label")))
        assert f"as predicted in {agree:.2%} of 260 rows" in result.stdout
        assert agree > 0.5
        newest = sorted((output / "_runs").iterdir())[-1]
        assert f"{newest}/probe/probe.safetensors" in result.stdout

    def test_a_probe_of_another_place_without_a_file(self, probed: tuple[Path, Result], output: Path) -> None:
        (weights,) = probed[0].glob("_runs/*/probe/probe.safetensors")
        report = report_of(run("predict", output, "--probe", weights, "--json"))
        assert report["rows"] == sum(each["rows"] for each in report["predicted"]) == 260
        assert (report["to"], report["version"], report["probe"]) == (None, 0, str(weights))

    def test_mistakes_are_one_line_and_exit_2(self, probed: tuple[Path, Result], output: Path, tmp_path: Path) -> None:
        (tmp_path / "no.safetensors").write_bytes(b"no probe at all")
        for where, options, message in (
            (output, [], "there is no saved probe; `pipeline probe` trains one"),
            (output, ["--probe", tmp_path / "no.safetensors"], "not a probe; it is a file probe.safetensors"),
            (output, ["--probe", tmp_path / "missing"], "there is no such file"),
            (probed[0], ["--to", tmp_path / "rows.json"], "give the URL of a .parquet or .csv file"),
            (probed[0], ["--version", "3"], "there is no version 3"),
        ):
            result = run("predict", where, *options, "--json")
            assert result.exit_code == 2, result.output
            assert message in result.stderr and result.stderr.count("\n") == 1
            assert message in report_of(result)["error"]
