"""The parts of the reference that are made from the code when the site is built, so that they cannot drift from it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

import griffe  # noqa: E402
import typer  # noqa: E402

from pipeline import config  # noqa: E402
from pipeline.cli import app  # noqa: E402

COLUMN = "COLUMN"
"""Stands for a name that the user chooses."""
API = (
    ("pipeline.config", "load", "load_config"),
    ("pipeline.driver", "run", "run"),
    ("pipeline.driver", "Summary", "Summary"),
    ("pipeline.dataset.read", "open_dataset", "open_dataset"),
    ("pipeline.dataset.read", "Dataset", "Dataset"),
    ("pipeline.dataset.read", "Neighbours", "Neighbours"),
    ("pipeline.reports", "plot_map", "plot_map"),
)
"""Module, name there, and name on the page."""
INNER = {"table_", "url", "entries", "read", "rows", "stat", "source", "node", "iter_values", "image_of", "images_of"}
"""Members of `Dataset` that the package itself needs; nobody else should have to."""


def config_fields() -> str:
    """A table for each section of a config: field, what it accepts, default, meaning."""
    schema = config.json_schema()
    return "\n\n".join(_section(location, found) for location, found in _sections(schema, schema, ()))


def _sections(schema: dict[str, Any], found: dict[str, Any], location: tuple[str, ...]) -> Iterator[tuple[Any, dict[str, Any]]]:
    yield location, found
    for name, field in found["properties"].items():
        named = field.get("additionalProperties")
        if isinstance(named, dict):
            yield from _sections(schema, _resolved(schema, named), (*location, name, COLUMN))
        for way in [field, *field.get("anyOf", [])]:
            if "$ref" in way:
                yield from _sections(schema, _resolved(schema, way), (*location, name))


def _resolved(schema: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    return dict(schema["$defs"][reference["$ref"].rpartition("/")[2]])


def _section(location: tuple[str, ...], found: dict[str, Any]) -> str:
    lines = [f"## `{'.'.join(location)}`" if location else "## The file", "", found.get("description", ""), ""]
    lines += ["| field | accepts | default | |", "|---|---|---|---|"]
    for name, field in found["properties"].items():
        accepts = config.allowed((*location, name)).removeprefix("allowed: ")
        default = "required" if name in found.get("required", []) else _default(field)
        lines.append(f"| `{name}` | {_cell(accepts)} | {_cell(default)} | {_cell(field.get('description', ''))} |")
    return "\n".join(lines)


def _default(field: dict[str, Any]) -> str:
    if "$ref" in field or "default" not in field:
        return ""
    return f"`{json.dumps(field['default'])}`"


def commands() -> str:
    """Every command: its help, arguments and options."""
    group: Any = typer.main.get_command(app)
    return "\n\n".join(_command(name, command) for name, command in group.commands.items())


def _command(name: str, command: Any) -> str:
    text, _, example = command.help.partition("Example: ")
    context = command.make_context(f"pipeline {name}", [], resilient_parsing=True)
    usage = command.get_usage(context).removeprefix("Usage: ")
    lines = [
        f"## {name}",
        "",
        "```",
        usage,
        "```",
        "",
        text.strip(),
        "",
        "```bash",
        example.strip(),
        "```",
        "",
        "| | |",
        "|---|---|",
    ]
    for each in command.params:
        if (record := each.get_help_record(context)) is not None:
            lines.append(f"| `{_cell(record[0])}` | {_cell(record[1])} |")
    return "\n".join(lines)


def api() -> str:
    """Signatures and docstrings of what a Python program uses."""
    shown = []
    for module, name, public in API:
        found = griffe.load(module, search_paths=[ROOT])[name]
        shown.append(_described(found, f"## `{public}`", public))
        if found.is_class:
            members = [each for each in found.members.values() if _is_public(found, each)]
            shown += [_described(each, f"### `{public}.{each.name}`", each.name) for each in members]
    return "\n\n".join(shown)


def _is_public(found: Any, member: Any) -> bool:
    """Whether a program may want it. Fields of a `Summary` are told by its `as_json`."""
    if member.name.startswith("_") or member.name in INNER or not member.docstring:
        return False
    return found.name != "Summary" or bool(member.is_function)


def _described(found: Any, heading: str, name: str) -> str:
    """Heading, signature and docstring of one object."""
    lines = [heading, ""]
    if found.is_function:
        signature = found.signature(name=name)
        lines += ["```python", signature.replace("(self, ", "(").replace("(self)", "()"), "```", ""]
    elif found.is_attribute and found.annotation is not None:
        lines += ["```python", f"{name}: {found.annotation}", "```", ""]
    for section in found.docstring.parse("google") if found.docstring else []:
        if section.kind.value == "text":
            lines += [section.value, ""]
            continue
        lines += [f"**{section.kind.value.capitalize()}**", ""]
        for each in section.value:
            what = getattr(each, "name", "") or each.annotation
            lines.append(f"- `{what}`: {' '.join(each.description.split())}")
        lines.append("")
    return "\n".join(lines).rstrip()


def _cell(text: str) -> str:
    """Text as a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


PARTS: dict[str, Callable[[], str]] = {"config": config_fields, "commands": commands, "api": api}
"""What a page can ask for."""
