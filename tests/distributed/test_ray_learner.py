"""Learning many tasks on a cluster of two nodes gives the artifacts of one machine, whatever is lost meanwhile."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from addenda import FrozenBackbone, LearnConfig, Registry
from addenda.distributed.cluster import LOOPBACK_ONLY, Workplace, connected
from addenda.distributed.ray_learner import LearningJob, learn_on_cluster, predecessors
from addenda.learner import LearnRow
from addenda.learner.activation_cache import NAME
from addenda.registry import TaskFilter
from tests.distributed.conftest import NODE
from tests.support.commands import Run
from tests.support.databases import Postgres
from tests.support.images import colour_folder
from tests.support.kill import Commands
from tests.support.moments import meanwhile

pytestmark = pytest.mark.ray

NAMED = """\
config: {epochs: 10, patience: 10, batch_size: 4, optimizer: sgd, learning_rate: 0.1, fall_back: false}
tasks:
  - {name: zebra, data: first}
  - {name: bear, data: second}
  - {name: ape, data: first}
  - {name: child, data: second, extends: [bear, zebra]}
"""
AUTO = "  - {name: chooser, data: third, extends: auto, config: {epochs: 2}}\n"
GLYPHS = ("--backbone", "glyphs", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and two task files: in the first, a task extends others by name; the second adds one with `auto`."""
    root = tmp_path_factory.mktemp("many")
    for seed, name in ((0, "first"), (1, "second"), (3, "third")):
        colour_folder(root / name, per_class=8, seed=seed)
    (root / "named.yaml").write_text(NAMED)
    (root / "tasks.yaml").write_text(NAMED + AUTO)
    return root


@pytest.fixture(scope="module")
def sequential(folder: Path) -> list[dict[str, Any]]:
    """The outcomes of learning the tasks in sequence, in one process on one thread."""
    return learn_in_sequence(folder / "alone", folder / "tasks.yaml", 1)


@pytest.fixture(scope="module")
def server(postgres: str) -> Iterator[Postgres]:
    database = Postgres(postgres)
    yield database
    database.close()


def learn_in_sequence(path: Path, file: Path, threads: int) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", str(threads))
        return Commands(path).run("learn-many", file, *GLYPHS)


def artifacts(outcomes: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(outcome["ref"], outcome["sha256"]) for outcome in outcomes]


def registered(location: str) -> list[str]:
    """The registered tasks in order; checks that there are no events but those of the tasks and their backbone."""
    with Registry.open(location, create=False) as registry:
        events = [(event.kind, event.subject) for event in registry.events()]
        refs = [record.ref for record in registry.tasks(TaskFilter(retired=True))]
        assert events[0][0] == "backbone"
        assert events[1:] == [("registered", ref) for ref in refs]
        assert registry.check_integrity().ok
    return refs


def at_work(node: Any) -> dict[str, int]:
    """The rows that the workers of a node are learning now, and the process id of each."""
    (raylet,) = node.all_processes["raylet"]
    pids = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_text().rstrip("\0 ")
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        if parent == raylet.process.pid and title.startswith("ray::learn "):
            pids[title.removeprefix("ray::learn ")] = int(process.name)
    return pids


def test_artifacts_are_those_of_learning_in_sequence(
    cluster: tuple[Any, str], server: Postgres, folder: Path, sequential: list[dict[str, Any]], run: Run
) -> None:
    location = server.new()
    done = run("learn-many", folder / "tasks.yaml", *GLYPHS, "--ray", cluster[1], "--registry", location, "--json")
    assert done.code == 0, done.err
    outcomes = json.loads(done.out)
    assert artifacts(outcomes) == artifacts(sequential)
    assert [outcome["metrics"] for outcome in outcomes] == [outcome["metrics"] for outcome in sequential]
    assert {outcome["state"] for outcome in outcomes} == {"learned"}
    assert outcomes[-1]["metrics"]["extensions"], "a task that extends nothing would prove nothing"
    order = registered(location)
    assert order.index("child:1") > max(order.index("bear:1"), order.index("zebra:1"))
    assert order[-1] == "chooser:1"


@pytest.mark.parametrize("lost", ["worker", "node"])
def test_a_task_on_a_lost_worker_is_learned_again_to_the_same_artifact_and_registered_once(
    cluster: tuple[Any, str],
    server: Postgres,
    folder: Path,
    sequential: list[dict[str, Any]],
    run: Run,
    cache_folder: Path,
    lost: str,
) -> None:
    nodes, address = cluster
    (other,) = nodes.worker_nodes
    rows, victims = {}, []

    def all_train() -> bool:
        on_other = at_work(other)
        rows.clear()
        rows.update(at_work(nodes.head_node) | on_other)
        return bool(on_other) and len(rows) > 1 and len(list(cache_folder.glob(f"{NAME}/runs/*"))) == len(rows)

    def lose() -> None:
        victims.extend(at_work(other).values())
        if lost == "worker":
            os.kill(victims[0], signal.SIGKILL)
        else:
            nodes.remove_node(other, allow_graceful=False)

    for _ in range(5):  # if Ray schedules all rows on one node, nothing is lost
        location = server.new()
        with meanwhile(all_train, lose):
            done = run("learn-many", folder / "named.yaml", *GLYPHS, "--ray", address, "--registry", location, "--json")
        if victims and lost == "node":
            nodes.add_node(**NODE)
        assert done.code == 0, done.err
        if victims:
            break
    assert victims, "nothing was lost while both nodes learned rows"
    assert artifacts(json.loads(done.out)) == artifacts(sequential[:-1])
    assert sorted(registered(location)) == ["ape:1", "bear:1", "child:1", "zebra:1"]
    assert list(cache_folder.glob(f"{NAME}/runs/*")) == []


def test_a_failed_task_is_named_and_the_next_run_learns_the_missing_tasks(
    cluster: tuple[Any, str], server: Postgres, folder: Path, tmp_path: Path, run: Run
) -> None:
    bad = colour_folder(tmp_path / "bad")
    image = bad / "red" / "0.png"
    good = image.read_bytes()
    image.write_bytes(b"no image")
    file = tmp_path / "tasks.yaml"
    file.write_text(
        "config: {epochs: 1, learning_rate: 0.3, augmentation: {views: 0}}\n"
        "tasks:\n"
        "  - {name: bad, data: bad}\n"
        "  - {name: child, data: bad, extends: bad}\n"
        f"  - {{name: free, data: {folder / 'first'}}}\n"
    )
    command = ("learn-many", file, *GLYPHS, "--ray", cluster[1], "--registry", server.new())
    first = run(*command)
    assert first.code == 1
    assert "bad failed: 1 of 24 images in" in first.out
    assert "child skipped: it extends 'bad', which failed" in first.out
    assert "Traceback" not in first.err
    assert "RayTaskError" not in first.out + first.err
    assert registered(command[-1]) == ["free:1"]
    image.write_bytes(good)
    second = run(*command, "--json")
    assert second.code == 0, second.err
    assert [row["state"] for row in json.loads(second.out)] == ["learned", "learned", "learned before"]
    assert registered(command[-1]) == ["free:1", "bad:1", "child:1"]


def test_the_cpus_of_a_task_are_its_threads(cluster: tuple[Any, str], tmp_path: Path, folder: Path, run: Run) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text(f"tasks: [{{name: wide, data: {folder / 'first'}, config: {{epochs: 2, learning_rate: 0.1}}}}]")
    expected = learn_in_sequence(tmp_path / "alone", file, 2)
    done = run("learn-many", file, *GLYPHS, "--ray", cluster[1], "--cpus", 2, "--json")
    assert artifacts(json.loads(done.out)) == artifacts(expected)
    with Registry.open(tmp_path / "tasks.db") as here, Registry.open(tmp_path / "alone" / "tasks.db") as alone:
        assert here.record("wide").data["run"] == alone.record("wide").data["run"], "the numerics are in it"


def test_impossible_requests_are_refused_with_a_reason(
    cluster: tuple[Any, str], tmp_path: Path, folder: Path, run: Run, glyphs: FrozenBackbone
) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text(f"tasks: [{{name: one, data: {folder / 'first'}}}]")
    many = ("learn-many", file, *GLYPHS)
    for options, message in (
        (("--cpus", 2), "Error: --cpus and --gpus require --ray."),
        (("--ray", cluster[1], "--cpus", 64), "Error: A task needs 64 CPUs and 0 GPUs of one node; the nodes have 2 a"),
        (("--ray", "somewhere"), "Error: No Ray cluster is reachable at 'somewhere': Invalid address format"),
        (("--ray", "127.0.0.1:9"), "Error: No Ray cluster is reachable at '127.0.0.1:9': [Errno 111] Connection ref"),
    ):
        refused = run(*many, *options)
        assert (refused.code, message in refused.err, "Traceback" in refused.err) == (2, True, False), refused.err
    with connected(cluster[1]), Registry.open(tmp_path / "tasks.db") as registry:
        rows = [LearnRow("unseen", tmp_path / "gone"), LearnRow("seen", folder / "first", None, LearnConfig(epochs=1))]
        registry.add_backbone(glyphs.record())
        job = LearningJob(Workplace(registry.location, device="cpu"))
        unseen, seen = learn_on_cluster(job, rows, registry)
    path = f"'{tmp_path / 'gone'}'"
    assert unseen.reason == f"{path} does not exist on node 127.0.0.1; the data must be at the same path on every node."
    assert (seen.state, seen.ref) == ("learned", "seen:1")


def test_what_ray_prints_is_not_on_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(LOOPBACK_ONLY, "0")
    monkeypatch.setattr("ray.init", lambda *_, **__: print("begins"))
    monkeypatch.setattr("ray.shutdown", lambda: print("ends"))
    with connected("local"):
        print("runs")
    assert capsys.readouterr() == ("", "begins\nruns\nends\n")


@given(st.data())
def test_in_any_order_of_completion_each_row_sees_what_it_sees_in_sequence(data: st.DataObject) -> None:
    names = "abcde"
    named = st.lists(st.sampled_from(names), unique=True, max_size=2).map(tuple)
    extended = data.draw(st.lists(st.just("auto") | named, min_size=len(names), max_size=len(names)))
    rows = [LearnRow(name, ".", None, LearnConfig(extends=e)) for name, e in zip(names, extended, strict=True)]

    def sees(row: LearnRow, versions: dict[str, int]) -> dict[str, int]:
        extends = row.config.extends
        return dict(versions) if extends == "auto" else {name: versions[name] for name in extends}

    versions, expected = dict.fromkeys(names, 1), []
    for row in rows:
        expected.append(sees(row, versions))
        versions[row.name] = 2
    versions, running, ready = dict.fromkeys(names, 1), [], []
    order = TopologicalSorter(predecessors(rows))
    order.prepare()
    while order.is_active():
        ready += order.get_ready()
        index = data.draw(st.sampled_from(sorted(ready + running)))
        assert sees(rows[index], versions) == expected[index]
        if index in ready:
            ready.remove(index)
            running.append(index)
        else:
            running.remove(index)
            versions[rows[index].name] = 2
            order.done(index)
