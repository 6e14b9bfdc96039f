"""The files for operators agree with the application: routes, ports, options, metrics and times."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import typer.main
import yaml

from addenda import FrozenBackbone, Registry, cli
from tests.servers import client_of

DEPLOY = Path(__file__).parents[1] / "deploy"
STOP_S = 30
"""What `addenda serve` gives to what was begun, after the drain."""


def options_of_serve() -> set[str]:
    return {option for each in typer.main.get_command(cli.app).commands["serve"].params for option in each.opts}


def manifests() -> dict[str, Any]:
    return {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


def container() -> dict[str, Any]:
    return manifests()["Deployment"]["spec"]["template"]["spec"]["containers"][0]


def value(arguments: list[str], option: str) -> int:
    return int(next(one.partition("=")[2] for one in arguments if one.startswith(f"{option}=")))


def test_the_probes_ask_for_what_exists(tiny: FrozenBackbone, registry: Registry) -> None:
    probes = [container()[probe]["httpGet"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")]
    with client_of(tiny, registry) as client:
        assert [client.get(probe["path"]).status_code for probe in probes] == [200] * 3
    assert {probe["port"] for probe in probes} == {"http"}


def test_ports_and_names_agree_in_kubernetes() -> None:
    found, arguments = manifests(), container()["args"]
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert ports == {"http": value(arguments, "--port"), "metrics": value(arguments, "--metrics-port")}
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == "http"
    template = found["Deployment"]["spec"]["template"]
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(ports["metrics"])
    for selector in (found["Service"]["spec"]["selector"], found["Deployment"]["spec"]["selector"]["matchLabels"]):
        assert selector.items() <= template["metadata"]["labels"].items()
    wanted = [env["valueFrom"]["secretKeyRef"] for env in container()["env"] if "valueFrom" in env]
    assert {one["name"] for one in wanted} == {found["Secret"]["metadata"]["name"]}
    assert {one["key"] for one in wanted} | {"keys.json"} == found["Secret"]["stringData"].keys()


def test_what_is_stopped_has_the_time_that_it_takes() -> None:
    grace = manifests()["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    waits = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    assert waits + value(container()["args"], "--drain") + STOP_S < grace
    unit = (DEPLOY / "addenda.service").read_text()
    drain, stop = re.search(r"--drain (\d+)", unit), re.search(r"TimeoutStopSec=(\d+)", unit)
    assert int(drain[1]) + STOP_S < int(stop[1])


def test_every_option_that_is_given_exists() -> None:
    unit = re.search(r"^ExecStart=\S+ serve (.*)$", (DEPLOY / "addenda.service").read_text(), re.MULTILINE)
    command = re.search(r"^CMD \[(.*)\]$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    given = [*shlex.split(unit[1]), *shlex.split(command[1].replace(",", " ")), *container()["args"]]
    options = {word.partition("=")[0] for word in given if word.startswith("--")}
    assert len(options) > 5
    assert options <= options_of_serve()


def test_the_alerts_are_about_metrics_that_exist(tiny: FrozenBackbone, registry: Registry) -> None:
    with client_of(tiny, registry) as client:
        client.get("/livez")
        shown = client.get("/metrics").text
        routes = set(client.app.openapi()["paths"])
    alerts = [rule["expr"] for rule in yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"][0]["rules"]]
    names = {name for expression in alerts for name in re.findall(r"addenda_\w+", expression)}
    assert len(names) > 4
    assert all(f"\n{name}" in shown for name in names), names
    assert "/api/v1/predict" in routes
    assert 'route="/livez"' in shown
    [scrape] = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"]
    unit = re.search(r"--metrics-port (\d+)", (DEPLOY / "addenda.service").read_text())
    assert scrape["static_configs"][0]["targets"] == [f"127.0.0.1:{unit[1]}"]
