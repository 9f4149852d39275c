"""The image's steps, as far as they can be looked at without building it. `image_steps.py` carries them out."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from commands import ROOT
from image_steps import DOCKERFILE, Folder, Step, copies, steps

STEPS = steps(DOCKERFILE.read_text())


def of(name: str) -> list[str]:
    return [step.argument for step in STEPS if step.name == name]


def test_it_is_made_of_pinned_versions_and_ends_as_nobody_with_the_command() -> None:
    (base,) = of("FROM")
    requirements = (ROOT / "deploy" / "requirements.txt").read_text()
    assert base.startswith("python:3.11-") and "Python 3.11" in requirements
    assert of("RUN")[2:] == [
        "pip install --requirement deploy/requirements.txt",
        "pip install --no-deps --no-build-isolation .",
        "pipeline --help",
    ]
    assert all("==" in line for line in requirements.splitlines() if not line.startswith("#"))
    assert of("USER") == ["1000"]
    last_user = [step.name for step in STEPS].index("USER")
    assert [step.argument for step in STEPS[last_user:] if step.name == "RUN"] == ["pipeline --help"]


def test_only_debians_packages_and_the_user_are_left_out_where_there_is_no_docker() -> None:
    assert [step.argument.split()[0] for step in STEPS if step.is_of_the_system] == ["apt-get", "useradd"]
    assert {step.name for step in STEPS} == {"FROM", "RUN", "COPY", "ENV", "WORKDIR", "USER", "CMD"}


def test_whatever_is_copied_is_there_and_not_ignored(tmp_path: Path) -> None:
    ignored = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    for step in (step for step in STEPS if step.name == "COPY"):
        *patterns, _ = step.argument.split()
        sources, _ = copies(step, ROOT)
        assert sources
        for pattern in patterns:
            assert f"!{pattern.replace('[s]', 's')}" in ignored


def test_weights_are_baked_in_where_there_are_any(tmp_path: Path) -> None:
    (tmp_path / "context" / "weights" / "hub").mkdir(parents=True)
    (tmp_path / "context" / "weights" / "hub" / "model.pth").write_bytes(b"weights")
    (tmp_path / "context" / "LICENSE").write_text("free")
    folder = Folder(tmp_path / "image", tmp_path / "context")
    (step,) = [step for step in STEPS if "weight" in step.argument and step.name == "COPY"]
    folder.do(step)
    assert (tmp_path / "image" / "opt" / "weights" / "hub" / "model.pth").read_bytes() == b"weights"
    (environment,) = of("ENV")
    assert "TORCH_HOME=/opt/weights" in environment.split()


def test_a_step_that_fails_is_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        Folder(tmp_path).do(Step("RUN", "exit 3"))
