"""What a command line itself has wrong, said as every other mistake: one line with the mend, and JSON where it is asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from pipeline.errors import nearest, printable

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""Base of what the parser raises; typer does not name it, and brings a click of its own in its newer releases."""


class Commands(TyperGroup):
    """The commands; what the parser refuses is one line, not a box of ten."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        """Parse, run the command, and end with its exit code."""
        if not extra.pop("standalone_mode", True):
            return super().main(args, prog_name, standalone_mode=False, **extra)
        try:
            sys.exit(super().main(args, prog_name, standalone_mode=False, **extra))
        except UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()  # type: ignore[attr-defined]
            else:
                line = explain(error)
                typer.echo(f"error: {printable(line)}", err=True)
                if "--json" in (sys.argv[1:] if args is None else args):
                    typer.echo(json.dumps({"error": line}, ensure_ascii=False))
            sys.exit(2)
        except typer.Abort:
            sys.exit(1)


def explain(error: Any) -> str:
    """The line for what the parser raised: the command, the option or argument, what is wrong, and what to do."""
    command = error.ctx.command_path if error.ctx is not None else "pipeline"
    help_has = f"`{command} --help` shows how it is used"
    if wrong := getattr(error, "option_name", None) if hasattr(error, "possibilities") else None:
        options = [name for param in error.ctx.command.params for name in param.opts + param.secondary_opts]
        begun = ", ".join(name for name in options if name.startswith(wrong))
        hint = f"did you mean {begun}?" if begun else nearest(wrong, [*options, "--help"], 1) or help_has
        return f"{command}: there is no option {wrong}; {hint}"
    text = " ".join(error.format_message().split()).removesuffix(".")
    text = text.replace("Value error, ", "").replace("Input should be", "it should be")
    return f"{command}: {text}" if text.endswith("?") else f"{command}: {text}; {help_has}"
