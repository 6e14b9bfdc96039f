"""Writes docs/commands.md: every command with its arguments and options, from what it says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from addenda import cli

PAGE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"
HEAD = """# Commands

What each command says of itself with `--help`, on one page, made by `scripts/write_commands.py`. Exit codes: 0; 1 where
a command ran and found a failure; 2 for bad usage or input, told in one line; 130 after Ctrl-C. `addenda --version`
prints the version, and `addenda --install-completion` has your shell complete all of this.
"""


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The page's text."""
    root: Any = typer.main.get_command(cli.app)
    return "\n".join([HEAD, *sections(root, "addenda")])


def sections(group: Any, words: str) -> Iterator[str]:
    """A section for each command of a group, in the order of its help; a group within has a heading of its own."""
    for name, command in group.commands.items():
        full = f"{words} {name}"
        below = hasattr(command, "commands")
        yield f"{'##' if below or words == 'addenda' else '###'} {full}\n\n{command.help}\n"
        yield from sections(command, full) if below else usage(command, full)


def usage(command: Any, words: str) -> Iterator[str]:
    """How a command is called, and a table of what it takes."""
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option"]
    call = [placeholder(one) for one in arguments]
    call += [f"{one.opts[0]} VALUE" for one in options if one.required] + ["[OPTIONS]"] * bool(options)
    yield f"```text\n{' '.join([words, *call])}\n```\n"
    rows = [(placeholder(one), described(one)) for one in arguments]
    for one in options:
        names = ", ".join([*one.opts, *one.secondary_opts])
        rows.append((names if one.is_flag else f"{names} VALUE", described(one)))
    if rows:
        yield "\n".join(["| | |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in rows)]) + "\n"


def placeholder(argument: Any) -> str:
    """An argument as a call shows it: in brackets where it may be left out, with dots where it may be repeated."""
    name = argument.name.upper() + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def described(parameter: Any) -> str:
    """A parameter's help, its default, and the environment variable that stands for it."""
    notes = [parameter.help]
    if parameter.required and parameter.param_type_name == "option":
        notes.append("Required.")
    if parameter.default is not None and not getattr(parameter, "is_flag", False):
        notes.append(f"Default: `{parameter.default}`.")
    if parameter.envvar:
        notes.append(f"Environment: `{parameter.envvar}`.")
    return " ".join(notes).replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    main()
