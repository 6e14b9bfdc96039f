"""Writes docs/commands.md: every command with its arguments and options, from the help texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from addenda import cli

PAGE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"
HEAD = """# Commands

The `--help` of every command on one page, written by `scripts/write_commands.py`. Exit codes: 0 for success, 1 if a
command ran and found a failure, 2 for invalid usage or input, which prints one line, and 130 after Ctrl-C.
`addenda --version` prints the version, and `addenda --install-completion` installs shell completion.
"""


def main() -> None:
    """Writes docs/commands.md."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The text of the page."""
    root: Any = typer.main.get_command(cli.app)
    return "\n".join([HEAD, *sections(root, "addenda")])


def sections(group: Any, prefix: str) -> Iterator[str]:
    """A section for each command of a group, in the order of its help; subgroups have their own heading."""
    for name, command in group.commands.items():
        words = f"{prefix} {name}"
        is_group = hasattr(command, "commands")
        yield f"{'##' if is_group or prefix == 'addenda' else '###'} {words}\n\n{command.help}\n"
        yield from sections(command, words) if is_group else usage(command, words)


def usage(command: Any, words: str) -> Iterator[str]:
    """The usage line of a command, and a table of its arguments and options."""
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [param for param in command.params if param.param_type_name == "option"]
    call = [placeholder(argument) for argument in arguments]
    call += [f"{option.opts[0]} VALUE" for option in options if option.required] + ["[OPTIONS]"] * bool(options)
    yield f"```text\n{' '.join([words, *call])}\n```\n"
    rows = [(placeholder(argument), described(argument)) for argument in arguments]
    for option in options:
        names = ", ".join([*option.opts, *option.secondary_opts])
        rows.append((names if option.is_flag else f"{names} VALUE", described(option)))
    if rows:
        yield "\n".join(["| | |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in rows)]) + "\n"


def placeholder(argument: Any) -> str:
    """An argument in the usage line: brackets if it is optional, dots if it may be repeated."""
    name = argument.name.upper() + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def described(parameter: Any) -> str:
    """The help of a parameter, with its default and its environment variable."""
    notes = [parameter.help]
    if parameter.required and parameter.param_type_name == "option":
        notes.append("Required.")
    if parameter.default not in (None, "") and not getattr(parameter, "is_flag", False):
        notes.append(f"Default: `{parameter.default}`.")
    if parameter.envvar:
        notes.append(f"Environment: `{parameter.envvar}`.")
    return " ".join(notes).replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    main()
