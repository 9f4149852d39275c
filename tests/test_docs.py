"""The documentation: it builds, its links lead somewhere, its configs are valid, its Python runs, its commands exist."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml
from commands import ROOT, invoke
from conftest import tar_bytes

from pipeline import config
from pipeline.cli import COMMANDS, app

DATASET = "data/digits-efficientnet"
BASE = {
    "source": {"url": "s3://photos/*.tar", "label": "cls"},
    "backbone": {"model": "torchvision/resnet50", "weights": "IMAGENET1K_V2", "nodes": {"embedding": {"node": "flatten"}}},
    "output": {"url": "s3://features/photos"},
}
"""What the parts of configs are parts of."""
FIRST_KEPT, OTHERS_KEPT = 50, 15
"""Images of the first shard of the demo data, and of each other one, that stay when the tutorial is walked through."""


def module(name: str) -> ModuleType:
    """A module of docs/."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        return made
    finally:
        sys.path.remove(str(ROOT / "docs"))


BUILD = module("build")
PAGES: list[Path] = BUILD.pages()


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """Fenced blocks of a page in these languages: language and text."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [(language, text) for language, text in found if language in languages]


def named(pages: list[Path], language: str) -> list[Any]:
    """All blocks in a language, as cases that say where they stand."""
    return [
        pytest.param(text, id=f"{page}-{number}") for page in pages for number, (_, text) in enumerate(blocks(page, language))
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the site was built."""
    to = tmp_path_factory.mktemp("docs") / "built"
    done = subprocess.run([sys.executable, ROOT / "docs" / "build.py", "--to", to], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stdout + done.stderr
    return to


class TestSite:
    """What a reader gets."""

    def test_every_page_is_there_and_in_the_menu(self, site: Path) -> None:
        menu = set(re.findall(r'"([\w/-]+\.md)"', (ROOT / "docs" / "zensical.toml").read_text()))
        assert menu == {str(page) for page in PAGES}
        for page in PAGES:
            folder = page.parent if page.name == "README.md" else page.with_suffix("")
            assert "<h1" in (site / "site" / folder / "index.html").read_text(), page

    def test_links_lead_to_files(self) -> None:
        missing = [f"{page}: {target}" for page in PAGES for target in BUILD.links(page) if not (ROOT / target).is_file()]
        assert not missing

    def test_the_reference_has_every_command_and_field(self, site: Path) -> None:
        commands = (site / "pages/docs/reference/commands.md").read_text()
        assert re.findall(r"^## (\w+)$", commands, re.MULTILINE) == [command.__name__ for command in COMMANDS]
        assert "`--retry-quarantined`" in commands
        fields = (site / "pages/docs/reference/config.md").read_text()
        for section in (
            config.Source,
            config.Storage,
            config.Backbone,
            config.Node,
            config.Preprocess,
            config.Run,
            config.Probe,
        ):
            for field in section.model_fields:
                assert f"| `{field}` |" in fields
        assert "a number from 0 to 1 | `0.2` |" in fields
        python = (site / "pages/docs/reference/python.md").read_text()
        assert {"## `run`", "## `Dataset`", "### `Dataset.search`", "- `vectors`: (Q, D) numbers."} <= set(python.splitlines())

    def test_nothing_is_loaded_from_elsewhere(self, site: Path) -> None:
        for page in (site / "site").rglob("*.html"):
            loaded = re.findall(r"<(?:script|img)[^>]+src=\"?(https?:[^\" >]+)", page.read_text())
            loaded += re.findall(r"<link[^>]+rel=\"?stylesheet\"?[^>]+href=\"?(https?:[^\" >]+)", page.read_text())
            assert not loaded, page


@pytest.mark.parametrize("text", named(PAGES, "yaml"))
def test_configs_are_valid(text: str) -> None:
    raw = yaml.safe_load(text)
    if text.startswith("# part of a config\n"):
        whole = copy.deepcopy(BASE)
        for section, values in raw.items():
            whole[section] = {**whole.get(section, {}), **values} if isinstance(values, dict) else values
        raw = whole
    config.parse(raw)


_COMMAND = re.compile(r'(?:^|&& |\* |-m |/bin/)pipeline"? +([a-z].*?)(?= && | \|\| |$)', re.MULTILINE)


def command_lines() -> list[Any]:
    """Every `pipeline …` in a block of the pages, as a case."""
    found = []
    for page in PAGES:
        code = "".join(text for _, text in blocks(page, "bash"))
        code += "".join(re.findall(r"^    (?! )(.*\n)", (ROOT / page).read_text(), re.MULTILINE))
        found += [pytest.param(line, id=f"{page}: {line}") for line in _COMMAND.findall(code)]
    return found


@pytest.mark.parametrize("line", command_lines())
def test_commands_and_options_exist(line: str) -> None:
    group: Any = typer.main.get_command(app)
    name, *arguments = shlex.split(re.sub(r"\$\(.*?\)", "NAME", line), comments=True)
    assert name in group.commands
    group.commands[name].make_context(name, arguments)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory, local_ray: None, one_thread: None) -> Iterator[list[tuple[str, str]]]:
    """The tutorial walked through in a folder of its own, with fewer images: what blocks printed, and what is shown."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "configs").symlink_to(ROOT / "configs")
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield list(walk())
    finally:
        os.chdir(before)


def walk() -> Iterator[tuple[str, str]]:
    """What is printed by each block of the tutorial that is followed by its output, and that output."""
    printed = ""
    names: dict[str, Any] = {}
    for language, text in blocks(Path("docs/tutorial.md"), "bash", "python", "text"):
        if language == "text":
            yield printed, text
        elif language == "bash":
            printed = "".join(typed(line) for line in text.splitlines() if not line.startswith("python3 -m venv"))
        else:
            printed = run_python(text, names)


def typed(line: str) -> str:
    """What a line prints on stdout. Of the demo data only some images of each shard stay."""
    program, *arguments = shlex.split(line)
    if program == "rm":
        Path(*arguments).unlink()
        return ""
    assert program == "pipeline"
    done = invoke(*arguments)
    assert done.returncode == 0, f"{line}: {done.stderr}"
    if arguments[0] == "demo":
        for number, shard in enumerate(sorted(Path(arguments[1]).iterdir())):
            num_members = 2 * (OTHERS_KEPT if number else FIRST_KEPT)
            with tarfile.open(shard) as tar:
                members = {member.name: tar.extractfile(member).read() for member in tar.getmembers()[:num_members]}
            shard.write_bytes(tar_bytes(members))
    return done.stdout


def run_python(text: str, names: dict[str, Any]) -> str:
    """What a block prints."""
    printed: list[str] = []
    names["print"] = lambda *values: printed.append(" ".join(map(str, values)) + "\n")
    exec(compile(text, "page", "exec"), names)
    return "".join(printed)


def labels(output: str) -> set[str]:
    """What stands at the beginning of the lines, without figures; continued lines are left out."""
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith(" ")]
    return {re.sub(r"[\d.,]+", "#", line[:12].strip().partition("  ")[0]) for line in lines}


def test_the_tutorial_prints_what_it_says(walked: list[tuple[str, str]]) -> None:
    assert len(walked) >= 14
    for printed, shown in walked:
        assert labels(shown) <= labels(printed), printed


@pytest.mark.usefixtures("walked")
@pytest.mark.parametrize("text", named([page for page in PAGES if page.name != "tutorial.md"], "python"))
def test_python_runs(text: str) -> None:
    if text.startswith("# needs a bucket\n"):
        compile(text, "page", "exec")
    else:
        run_python(text.replace("data/embeddings", DATASET), {})
