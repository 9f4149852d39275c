"""What lies in `deploy/`, parsed."""

from __future__ import annotations

import re
import shlex
import tomllib
from typing import Any

import typer
import yaml
from commands import ROOT

from pipeline.cli import app

DEPLOY = ROOT / "deploy"
KUBERAY = DEPLOY / "kuberay"
ROOT_COMMAND: Any = typer.main.get_command(app)


def documents(name: str) -> list[dict[str, Any]]:
    """The documents of a YAML file below `deploy/`."""
    return [each for each in yaml.safe_load_all((DEPLOY / name).read_text()) if each]


def command(line: str) -> tuple[str, dict[str, Any]]:
    """A command line of `pipeline` as its own parser takes it: the command's name, and its parameters.

    Raises:
        UsageError: it does not take it.
    """
    program, *arguments = shlex.split(line)
    assert program.rpartition("/")[2] == "pipeline"
    context = ROOT_COMMAND.make_context("pipeline", list(arguments))
    name, found, rest = ROOT_COMMAND.resolve_command(context, list(arguments))
    return name, found.make_context(name, rest, parent=context).params


def pinned(package: str) -> str:
    """The version in `deploy/requirements.txt`."""
    (version,) = re.findall(rf"^{package}==(.+)$", (DEPLOY / "requirements.txt").read_text(), re.MULTILINE)
    return str(version)


def image() -> str:
    """The image's name, as the versions of this package and of Ray make it."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return f"registry.example.com/frozen-pipeline:{version}-ray{pinned('ray')}"
