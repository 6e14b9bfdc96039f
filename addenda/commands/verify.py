"""Verifying: tasks by their golden probes, computed again, and this machine by a checkup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

import addenda
from addenda.commands import options
from addenda.exceptions import IntegrityError
from addenda.terminal import answer, console, plural, print_json, table


def verify(
    names: Annotated[list[str] | None, Argument(help="Tasks to verify. Default: all active ones.")] = None,
    everything: Annotated[bool, Option("--all", help="Verify retired tasks too.")] = False,
    record: Annotated[
        bool, Option("--record", help="Keep probes that passed under new numerics, to compare bits from now on.")
    ] = False,
    deep: Annotated[
        bool, Option("--deep", help="Also hash every stored byte of the registry and check its whole history.")
    ] = False,
    head: Annotated[
        str | None, Option(help="A digest that an earlier --deep printed: nothing up to it may be missing.")
    ] = None,
    registry: options.Registry = options.DEFAULT_REGISTRY,
    weights: options.Weights = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Recomputes tasks' golden probes and compares every bit; exits with 1 if one differs."""
    from addenda.registry import TaskFilter

    with options.open_registry(registry) as opened:
        refs = list(dict.fromkeys(opened.record(name).ref for name in names or ()))
        refs = refs or [r.ref for r in opened.tasks(TaskFilter(retired=everything))]
        verdicts = _verdicts(opened, refs, weights, device, record)
        stored = opened.check_integrity(head) if deep or head else None
    if as_json:
        print_json(verdicts if stored is None else {"tasks": verdicts, "registry": asdict(stored)})
    else:
        rows = [(v["task"], "ok" if v["ok"] else "FAILED", v.get("compared", "–"), v["detail"]) for v in verdicts]
        title = f"{plural(len(rows), 'task')} verified on golden probes"
        console.print(table(title, ("task", "", "compared", "result"), rows))
        for now in dict.fromkeys(v["numerics_fingerprint"] for v in verdicts if "numerics_fingerprint" in v):
            console.print(f"Computed under numerics {now[:12]}….")
        if not record and any(v["ok"] and not v["same_numerics"] for v in verdicts):
            console.print("New numerics: `addenda verify --record` keeps these probes, to compare bits from now on.")
        if stored is not None:
            said = "all as they were written." if stored.ok else f"{len(stored.faults)} faults."
            console.print(f"{stored.num_tasks} versions and {stored.generation} events hashed: {said}")
            wrong = [*((fault.subject, fault.said) for fault in stored.faults), *(("–", of) for of in stored.unchecked)]
            if wrong:
                console.print(table("What is wrong", ("of", "fault"), wrong))
            typer.echo(f"The last event's digest: {stored.head}")
    failed = [v["task"] for v in verdicts if not v["ok"]] + ([] if stored is None or stored.ok else ["the registry"])
    if failed:
        typer.echo(f"Failed: {', '.join(failed)}.", err=True)
        raise typer.Exit(1)


def _verdicts(
    registry: addenda.Registry, refs: Sequence[str], weights: Path | None, device: str, record: bool
) -> list[dict[str, Any]]:
    """Each task's verdict; one that cannot be trusted does not keep the others from being verified."""
    from addenda.combined import golden, recorded_backbone
    from addenda.combined import verify as verify_tasks

    verdicts: dict[str, dict[str, Any]] = {}
    stored: dict[str, list[Any]] = {}  # by backbone
    for ref in refs:
        try:
            found = registry.get(ref), registry.goldens(ref)
            stored.setdefault(found[0].backbone, []).append(found)
        except IntegrityError as error:
            verdicts[ref] = {"task": ref, "ok": False, "detail": str(error)}
    for fingerprint, recorded in stored.items():
        try:
            loaded = recorded_backbone(registry, weights, device, fingerprint)
        except IntegrityError as error:
            verdicts |= {task.ref: {"task": task.ref, "ok": False, "detail": str(error)} for task, _ in recorded}
            continue
        for (task, _), verdict in zip(recorded, verify_tasks(loaded, recorded), strict=True):
            verdicts[task.ref] = vars(verdict)
            if record and verdict.ok and not verdict.same_numerics:
                registry.add_golden(task.ref, golden(loaded, task))
    return [verdicts[ref] for ref in refs]


def doctor(
    registry: options.Registry = options.DEFAULT_REGISTRY,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Says what works here and what does not: packages, devices, the registry, weights, and the exactness self-test.

    Exits with 1 if something is broken; what is merely not installed or not there yet is no fault.
    """
    from addenda.commands.checkup import checkup

    findings = list(checkup(registry, device))
    broken = [finding.subject for finding in findings if finding.state == "BROKEN"]
    shown = table("What works here", ("what", "", "detail"), findings, whole=("what", ""))
    answer(as_json, [finding._asdict() for finding in findings], shown)
    if broken:
        typer.echo(f"Broken: {', '.join(broken)}.", err=True)
        raise typer.Exit(1)
