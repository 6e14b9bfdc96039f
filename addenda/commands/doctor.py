"""The `doctor` command."""

from __future__ import annotations

import typer

from addenda.commands.options import DEFAULT_REGISTRY, DeviceOption, JsonOption, RegistryOption


def doctor(
    registry: RegistryOption = DEFAULT_REGISTRY, device: DeviceOption = "auto", as_json: JsonOption = False
) -> None:
    """Says what works here and what does not: packages, devices, the registry, weights, and the exactness self-test.

    Exits with 1 if something is broken; what is merely not installed or not there yet is no fault.
    """
    from addenda.commands.checkup import checkup
    from addenda.terminal import console, print_json, table

    findings = list(checkup(registry, device))
    broken = [finding.subject for finding in findings if finding.state == "BROKEN"]
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        console.print(table("What works here", ("what", "", "detail"), findings, whole=("what", "")))
    if broken:
        typer.echo(f"Broken: {', '.join(broken)}.", err=True)
        raise typer.Exit(1)
