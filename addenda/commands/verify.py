"""The commands `verify`, which recomputes golden probes, and `doctor`, which checks this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

import addenda
from addenda.commands import options
from addenda.exceptions import AddendaError, IntegrityError, UnknownTaskError
from addenda.terminal import console, print_json, print_result, table
from addenda.text import plural


def verify(
    names: Annotated[
        list[str] | None,
        Argument(help="Tasks to verify: NAME, NAME:VERSION or NAME@ALIAS. Default: all versions that are not retired."),
    ] = None,
    include_retired: Annotated[bool, Option("--all", help="Without NAMES: verify retired versions too.")] = False,
    record: Annotated[
        bool,
        Option(
            "--record",
            help="For tasks that passed under changed numerics, store a new golden probe, so that later runs here "
            "compare bits.",
        ),
    ] = False,
    deep: Annotated[
        bool, Option("--deep", help="Also hash every stored byte of the registry and check its complete history.")
    ] = False,
    head: Annotated[
        str | None,
        Option(
            help="Ledger digest of an earlier --deep run: fail if history up to it was removed or changed. Implies "
            "--deep."
        ),
    ] = None,
    registry: options.Registry = options.DEFAULT_REGISTRY,
    weights: options.Weights = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Recomputes the golden probes (stored logits) of tasks and compares them bit for bit.

    Exits with 1 if bits differ or, under another numerics fingerprint, if they differ by more than the tolerance.
    """
    from addenda.registry import TaskFilter

    if names and include_retired:
        raise AddendaError("--all verifies every version, retired ones included; give it without task names.")
    with options.open_registry(registry) as opened:
        integrity = opened.check_integrity(head) if deep or head is not None else None
        try:
            refs = list(dict.fromkeys(opened.record(name).ref for name in names or ()))
            refs = refs or [r.ref for r in opened.tasks(TaskFilter(retired=include_retired))]
            verdicts = _verdicts(opened, refs, weights, device, record)
        except AddendaError as error:
            if integrity is None or isinstance(error, UnknownTaskError):
                raise
            verdicts = [{"task": "golden probes", "ok": False, "detail": str(error)}]
    if as_json:
        print_json(verdicts if integrity is None else {"tasks": verdicts, "registry": asdict(integrity)})
    else:
        rows = [(v["task"], "ok" if v["ok"] else "FAILED", v.get("compared", "–"), v["detail"]) for v in verdicts]
        title = f"{plural(len(rows), 'task')} verified on golden probes"
        console.print(table(title, ("task", "", "compared", "result"), rows))
        for fingerprint in dict.fromkeys(v["numerics_fingerprint"] for v in verdicts if "numerics_fingerprint" in v):
            console.print(f"Numerics fingerprint of this run: {fingerprint[:12]}….")
        if not record and any(v["ok"] and not v["same_numerics"] for v in verdicts):
            console.print(
                "Numerics changed: `addenda verify --record` stores these probes for bitwise comparison from now on."
            )
        if integrity is not None:
            outcome = "none was altered." if integrity.ok else plural(len(integrity.faults), "fault") + "."
            hashed = f"{plural(integrity.num_tasks, 'version')} and {plural(integrity.generation, 'event')}"
            console.print(f"{hashed} hashed: {outcome}")
            findings = [(fault.subject, fault.message) for fault in integrity.faults]
            findings += [("–", unchecked) for unchecked in integrity.unchecked]
            if findings:
                console.print(table("Integrity findings", ("subject", "finding"), findings))
            typer.echo(f"Ledger digest: {integrity.head}")
    failed = [v["task"] for v in verdicts if not v["ok"]]
    failed += [] if integrity is None or integrity.ok else ["the registry"]
    if failed:
        typer.echo(f"Failed: {', '.join(failed)}.", err=True)
        raise typer.Exit(1)


def _verdicts(
    registry: addenda.Registry, refs: Sequence[str], weights: Path | None, device: str, record: bool
) -> list[dict[str, Any]]:
    """The verdict on each task; a corrupt task does not prevent the verification of the others."""
    from addenda.combined import golden, recorded_backbone
    from addenda.combined import verify as verify_tasks

    verdicts: dict[str, dict[str, Any]] = {}
    by_backbone: dict[str, list[Any]] = {}
    for ref in refs:
        try:
            task, goldens = registry.get(ref), registry.goldens(ref)
            by_backbone.setdefault(task.backbone, []).append((task, goldens))
        except IntegrityError as error:
            verdicts[ref] = {"task": ref, "ok": False, "detail": str(error)}
    for fingerprint, recorded in by_backbone.items():
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
    """Checks this installation: packages, devices, the registry, weights, and the exactness self-test.

    Exits with 1 if anything is broken. What is not installed or does not exist yet is reported as absent, not broken.
    """
    from addenda.commands.checkup import checkup

    findings = list(checkup(registry, device))
    broken = [finding.subject for finding in findings if finding.state == "BROKEN"]
    checks = table("Checks of this installation", ("subject", "state", "detail"), findings, whole=("state",))
    print_result(as_json, [finding._asdict() for finding in findings], checks)
    if broken:
        typer.echo(f"Broken: {', '.join(broken)}.", err=True)
        raise typer.Exit(1)
