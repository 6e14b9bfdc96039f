"""Writes docs/commands.md: every command with its arguments and options, from the help texts."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer.main

from addenda import cli

PAGE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"
HEAD = """# Commands

The `--help` of every command on one page, written by `scripts/write_commands.py`. Exit codes: 0 for
success, 1 if a command ran and found a failure, 2 for invalid usage, which shows the usage, and for
invalid input, which prints one line ([details](doctor.md#output-and-exit-codes)), and 130 after
Ctrl-C. `addenda --version` prints the version, and
`addenda --install-completion` installs shell completion.

## Shared options

Commands that take one of these only name it; `NAME` is an argument.
"""
SHARED = 3
"""What so many commands describe in the same words is described once, at the top."""


def main() -> None:
    """Writes docs/commands.md."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The text of the page."""
    root: Any = typer.main.get_command(cli.app)
    shared = shared_rows(root)
    return "\n".join([HEAD, table(shared), *sections(root, "addenda", shared)])


def shared_rows(root: Any) -> dict[str, str]:
    """The rows that at least SHARED commands have; of several rows of a name, the most frequent."""
    counts = Counter(row for command in commands(root) for row in rows_of(command).items())
    shared: dict[str, str] = {}
    for (name, text), count in counts.most_common():
        if count >= SHARED:
            shared.setdefault(name, text)
    return shared


def commands(group: Any) -> Iterator[Any]:
    """All commands of a group and of its subgroups."""
    for command in group.commands.values():
        yield from commands(command) if hasattr(command, "commands") else [command]


def sections(group: Any, prefix: str, shared: Mapping[str, str]) -> Iterator[str]:
    """A section for each command of a group, in the order of its help; subgroups have their own heading."""
    for name, command in group.commands.items():
        words = f"{prefix} {name}"
        is_group = hasattr(command, "commands")
        yield f"{'##' if is_group or prefix == 'addenda' else '###'} {words}\n\n{wrapped(command.help)}\n"
        yield from sections(command, words, shared) if is_group else usage(command, words, shared)


def usage(command: Any, words: str, shared: Mapping[str, str]) -> Iterator[str]:
    """The usage line of a command, a table of its own arguments and options, and the names of the shared ones."""
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [param for param in command.params if param.param_type_name == "option"]
    call = [placeholder(argument) for argument in arguments]
    call += [f"{option.opts[0]} VALUE" for option in options if option.required] + ["[OPTIONS]"] * bool(options)
    yield f"```text\n{' '.join([words, *call])}\n```\n"
    rows = rows_of(command)
    if own := {name: text for name, text in rows.items() if shared.get(name) != text}:
        yield table(own)
    if also := [f"`{name.partition(' ')[0]}`" for name in rows if name not in own]:
        yield wrapped(f"Shared: {', '.join(also)}.") + "\n"


def rows_of(command: Any) -> dict[str, str]:
    """The names of a command's arguments and options, with VALUE if an option takes one, and their descriptions."""
    rows = {}
    for param in command.params:
        names = ", ".join([*param.opts, *param.secondary_opts])
        if param.param_type_name == "argument":
            names = placeholder(param)
        elif not param.is_flag:
            names += " VALUE"
        rows[names] = described(param)
    return rows


def table(rows: Mapping[str, str]) -> str:
    """A table of names and descriptions."""
    return "\n".join(["| | |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in rows.items())]) + "\n"


def wrapped(text: str) -> str:
    """Paragraphs as lines of at most 100 columns."""
    return "\n\n".join(
        textwrap.fill(" ".join(part.split()), 100, break_long_words=False, break_on_hyphens=False)
        for part in text.split("\n\n")
    )


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
