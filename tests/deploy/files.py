"""What lies in `deploy/`, parsed."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import yaml
from commands import ROOT, parsed

DEPLOY = ROOT / "deploy"
KUBERAY = DEPLOY / "kuberay"
command = parsed


def documents(name: str) -> list[dict[str, Any]]:
    """The documents of a YAML file below `deploy/`."""
    return [each for each in yaml.safe_load_all((DEPLOY / name).read_text()) if each]


def pinned(package: str) -> str:
    """The version in `deploy/requirements.txt`."""
    (version,) = re.findall(rf"^{package}==(.+)$", (DEPLOY / "requirements.txt").read_text(), re.MULTILINE)
    return str(version)


def image() -> str:
    """The image's name, as the versions of this package and of Ray make it."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return f"registry.example.com/frozen-pipeline:{version}-ray{pinned('ray')}"
