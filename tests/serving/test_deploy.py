"""The deployment files agree with the application: routes, ports, options, metrics and timeouts."""

from __future__ import annotations

import re
import shlex
import tomllib
from typing import Any
from urllib.parse import parse_qs, urlsplit

import typer.main
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from addenda import FrozenBackbone, Registry, cli
from tests.support.places import ROOT
from tests.support.servers import client_of

DEPLOY = ROOT / "deploy"
OPERATOR = DEPLOY.parent / "docs" / "operator.md"
STOP_S = 30
"""Seconds that `addenda serve` gives pending requests after the drain."""
START_S = 423
"""Start-up seconds of a server with 2,000 tasks (docs/scale.md)."""


def options_of_serve() -> set[str]:
    return {option for each in typer.main.get_group(cli.app).commands["serve"].params for option in each.opts}


def manifests() -> dict[str, Any]:
    return {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


def container() -> dict[str, Any]:
    return manifests()["Deployment"]["spec"]["template"]["spec"]["containers"][0]


def value(arguments: list[str], option: str) -> int:
    return int(next(word.partition("=")[2] for word in arguments if word.startswith(f"{option}=")))


def alerts() -> list[dict[str, Any]]:
    [group] = yaml.safe_load((DEPLOY / prometheus()["rule_files"][0]).read_text())["groups"]
    return group["rules"]


def prometheus() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())


def words_of_the_unit() -> list[str]:
    unit = re.search(r"^ExecStart=\S+ serve (.*)$", (DEPLOY / "addenda.service").read_text(), re.MULTILINE)
    return shlex.split(unit[1])


def words_of_the_image() -> list[str]:
    command = re.search(r"^CMD \[(.*)\]$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    return shlex.split(command[1].replace(",", " "))


def after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_the_probes_request_existing_routes(tiny: FrozenBackbone, registry: Registry) -> None:
    probes = [container()[probe]["httpGet"] for probe in ("startupProbe", "readinessProbe")]
    with client_of(tiny, registry) as client:
        assert [client.get(probe["path"]).status_code for probe in probes] == [200] * 2
    assert {probe["port"] for probe in probes} == {"http"}
    assert container()["livenessProbe"]["tcpSocket"] == {"port": "http"}


def test_ports_and_names_agree_in_kubernetes() -> None:
    documents, arguments = manifests(), container()["args"]
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert ports == {"http": value(arguments, "--port"), "metrics": value(arguments, "--metrics-port")}
    assert documents["Service"]["spec"]["ports"][0]["targetPort"] == "http"
    template = documents["Deployment"]["spec"]["template"]
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(ports["metrics"])
    for selector in (
        documents["Service"]["spec"]["selector"],
        documents["Deployment"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= template["metadata"]["labels"].items()
    references = [env["valueFrom"]["secretKeyRef"] for env in container()["env"] if "valueFrom" in env]
    assert {reference["name"] for reference in references} == {documents["Secret"]["metadata"]["name"]}
    assert {reference["key"] for reference in references} | {"keys.json"} == documents["Secret"]["stringData"].keys()


def test_the_metrics_have_one_port_everywhere() -> None:
    [target] = prometheus()["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == f"{after(words_of_the_unit(), '--host')}:{after(words_of_the_unit(), '--metrics-port')}"
    exposed = re.search(r"^EXPOSE (.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    image = words_of_the_image()
    assert exposed[1].split() == [after(image, "--port"), after(image, "--metrics-port")]
    [command] = re.findall(r"^addenda serve (.*--metrics-port.*)$", OPERATOR.read_text(), re.MULTILINE)
    ports = {
        after(words, "--metrics-port") for words in (words_of_the_unit(), image, shlex.split(command, comments=True))
    }
    assert ports == {str(value(container()["args"], "--metrics-port"))}
    assert after(shlex.split(command), "--host") == after(words_of_the_unit(), "--host")


def test_the_network_policy_opens_the_http_port_to_all_and_the_metrics_port_to_one_namespace() -> None:
    policy = manifests()["NetworkPolicy"]["spec"]
    assert policy["podSelector"] == manifests()["Deployment"]["spec"]["selector"]
    assert policy["policyTypes"] == ["Ingress"]
    reached = {port["port"]: rule.get("from") for rule in policy["ingress"] for port in rule["ports"]}
    assert reached.keys() == {port["name"] for port in container()["ports"]}
    assert reached["http"] is None
    assert [set(source) for source in reached["metrics"]] == [{"namespaceSelector"}]


def test_the_probes_allow_for_start_up_and_drain() -> None:
    def patience(probe: str) -> int:
        return container()[probe]["periodSeconds"] * container()[probe]["failureThreshold"]

    assert patience("startupProbe") > 2 * START_S
    assert patience("startupProbe") < manifests()["Deployment"]["spec"]["progressDeadlineSeconds"]
    assert patience("readinessProbe") < value(container()["args"], "--drain")


def test_the_grace_periods_cover_drain_and_shutdown() -> None:
    grace = manifests()["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    waits = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    assert waits + value(container()["args"], "--drain") + STOP_S < grace
    unit = (DEPLOY / "addenda.service").read_text()
    drain, stop = re.search(r"--drain (\d+)", unit), re.search(r"TimeoutStopSec=(\d+)", unit)
    assert int(drain[1]) + STOP_S < int(stop[1])


def test_every_option_in_the_deployment_files_exists() -> None:
    given = [*words_of_the_unit(), *words_of_the_image(), *container()["args"]]
    options = {word.partition("=")[0] for word in given if word.startswith("--")}
    assert len(options) > 5
    assert options <= options_of_serve()


def test_the_alerts_are_about_metrics_that_exist(tiny: FrozenBackbone, registry: Registry) -> None:
    with client_of(tiny, registry) as client:
        client.get("/livez")
        shown = client.get("/metrics").text
        routes = set(client.app.openapi()["paths"])
    expressions = [rule["expr"] for rule in alerts()]
    names = {name for expression in expressions for name in re.findall(r"addenda_\w+", expression)}
    assert len(names) > 4
    assert all(f"\n{name}" in shown for name in names), names
    assert 'route="/livez"' in shown
    patterns = [
        re.compile(route) for expression in expressions for route in re.findall(r'route=~"([^"]*)"', expression)
    ]
    assert len(patterns) == 3
    predict = {route for route in routes if route.endswith(("/predict", "/infer"))}
    assert len(predict) == 3
    assert all({route for route in routes if pattern.fullmatch(route)} == predict for pattern in patterns)


def test_prometheus_loads_the_alerts_and_each_has_a_severity() -> None:
    assert prometheus()["rule_files"] == ["alerts.yaml"]
    assert {rule["alert"] for rule in alerts()} > {"AddendaDown", "AddendaNothingServed"}
    assert all(rule["labels"]["severity"] in ("critical", "warning") for rule in alerts())
    jobs = {job for rule in alerts() for job in re.findall(r'job="(\w+)"', rule["expr"])}
    assert jobs == {job["job_name"] for job in prometheus()["scrape_configs"]}


def pinned() -> dict[str, Version]:
    """The package versions in an image, except torch, from the constraints file."""
    text = (DEPLOY / "constraints.txt").read_text()
    entries = re.findall(
        r"^([a-z0-9-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE
    )
    assert len(entries) == len(re.findall(r"^[a-z]", text, re.MULTILINE)), "each has a version and a hash"
    return {name: Version(version) for name, version, _ in entries}


def test_image_builds_pin_all_versions() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    [torch] = re.findall(r"torch==(\S+) torchvision==(\S+)", dockerfile)
    installed = pinned() | dict(zip(("torch", "torchvision"), map(Version, torch), strict=True))
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in (*project["dependencies"], *extras["serve"], *extras["postgres"]):
        requirement = Requirement(text)
        assert installed[requirement.name] in requirement.specifier, text
    assert re.search(r"^ARG BASE=python:3\.12-slim@sha256:[0-9a-f]{64}$", dockerfile, re.MULTILINE)
    assert re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE) == ["${BASE}"] * 2
    installs = re.findall(r"pip install (.*?)(?:&&|$)", dockerfile, re.MULTILINE)
    assert [bool(re.search("--require-hashes|torch==|--no-deps", install)) for install in installs] == [True] * 3


def test_the_build_context_contains_the_package_only() -> None:
    lines = (DEPLOY.parent / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
        for word in line.split()[:-1]
    }
    assert copied == allowed
    assert all((DEPLOY.parent / each).exists() for each in copied)
    assert {"**/*.db*", "**/addenda-keys*"} <= set(lines)


def test_the_database_certificate_is_verified_and_replicas_are_spread() -> None:
    registry = manifests()["Secret"]["stringData"]["registry"]
    query = parse_qs(urlsplit(registry).query)
    assert query == {"sslmode": ["verify-full"], "sslrootcert": ["system"]}
    spec = manifests()["Deployment"]["spec"]["template"]["spec"]
    [spread] = spec["topologySpreadConstraints"]
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    assert spread["labelSelector"] == manifests()["Deployment"]["spec"]["selector"]


def test_the_systemd_unit_is_sandboxed() -> None:
    lines = (DEPLOY / "addenda.service").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if re.match(r"[A-Z]\w+=", line))
    assert settings["UMask"] == "0077"
    assert settings["CapabilityBoundingSet"] == settings["AmbientCapabilities"] == ""
    assert {"MemoryMax", "TasksMax", "SystemCallFilter", "RestrictNamespaces"} <= settings.keys()
    kernel = [f"ProtectKernel{suffix}" for suffix in ("Logs", "Modules", "Tunables")]
    assert [settings[name] for name in kernel] == ["yes"] * 3
    assert "MemoryDenyWriteExecute" not in settings, "torch generates code at run time"


def test_ci_fails_without_a_browser() -> None:
    run = (DEPLOY.parent / ".ci" / "run").read_text()
    assert "export ADDENDA_TEST_BROWSER=required" in run
    assert re.search(r"command -v chromium .*\|\| \{ .*exit 1; \}", run)
