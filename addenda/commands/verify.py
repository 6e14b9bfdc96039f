"""Verifying tasks: their golden probes, computed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from addenda.commands.options import DEFAULT_REGISTRY, DeviceOption, JsonOption, RegistryOption, WeightsOption
from addenda.exceptions import IntegrityError

if TYPE_CHECKING:
    from addenda import Registry
    from addenda.registry import Integrity


def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Tasks to verify. Default: all active ones.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Verify retired tasks too.")] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Keep probes that passed under new numerics, to compare bits from now on.")
    ] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also hash every stored byte of the registry and check its whole history.")
    ] = False,
    head: Annotated[
        str | None, typer.Option(help="A digest that an earlier --deep printed: nothing up to it may be missing.")
    ] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Recomputes tasks' golden probes and compares every bit; exits with 1 if one differs."""
    from addenda import Registry
    from addenda.registry import TaskFilter
    from addenda.terminal import console, print_json, table

    with Registry.open(registry, create=False) as opened:
        refs = list(dict.fromkeys(opened.record(name).ref for name in names or ()))
        refs = refs or [r.ref for r in opened.tasks(TaskFilter(retired=everything))]
        verdicts = _verdicts(opened, refs, weights, device, record)
        stored = opened.check_integrity(head) if deep or head else None
    if as_json:
        print_json(verdicts if stored is None else {"tasks": verdicts, "registry": asdict(stored)})
    else:
        rows = [(v["task"], "ok" if v["ok"] else "FAILED", v.get("compared", "–"), v["detail"]) for v in verdicts]
        title = f"{len(rows)} task{'' if len(rows) == 1 else 's'} verified on golden probes"
        console.print(table(title, ("task", "", "compared", "result"), rows))
        for now in dict.fromkeys(v["numerics_fingerprint"] for v in verdicts if "numerics_fingerprint" in v):
            console.print(f"Computed under numerics {now[:12]}….")
        if not record and any(v["ok"] and not v["same_numerics"] for v in verdicts):
            console.print("New numerics: `addenda verify --record` keeps these probes, to compare bits from now on.")
        if stored is not None:
            _show_integrity(stored)
    failed = [v["task"] for v in verdicts if not v["ok"]] + ([] if stored is None or stored.ok else ["the registry"])
    if failed:
        typer.echo(f"Failed: {', '.join(failed)}.", err=True)
        raise typer.Exit(1)


def _show_integrity(found: Integrity) -> None:
    from addenda.terminal import console, table

    console.print(
        f"{found.num_tasks} versions and {found.generation} events hashed: "
        + ("all as they were written." if found.ok else f"{len(found.faults)} faults.")
    )
    if found.faults or found.unchecked:
        rows = [(fault.subject, fault.said) for fault in found.faults]
        console.print(table("What is wrong", ("of", "fault"), [*rows, *(("–", said) for said in found.unchecked)]))
    typer.echo(f"The last event's digest: {found.head}")


def _verdicts(
    registry: Registry, refs: Sequence[str], weights: Path | None, device: str, record: bool
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
