"""Shared fixtures: tiny seeded backbones and tasks, on the CPU and without network access."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
# The models are tiny: on a busy machine several threads of torch or scikit-learn mostly wait for each other, and by
# default they wait actively.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
os.environ.pop("COLUMNS", None)  # set per test; pytest-xdist's value would be fixed when the console is created

import pytest
import torch

from addenda.backbones import FrozenBackbone, load_backbone
from addenda.benchmarks.demo import digits
from addenda.registry import Registry, Task
from tests.support import travel
from tests.support.commands import Result, Run, addenda
from tests.support.databases import Database, Postgres, Sqlite, postgres_server, rows
from tests.support.places import SHARED
from tests.support.processes import start_another_interpreter
from tests.support.registries import BACKBONE, fill
from tests.support.tasks import random_task
from tests.support.tiny import tiny_vit

torch.set_num_threads(1)

CHROMIUM = Path("/usr/bin/chromium")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "realdata" in item.keywords and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason="the real weights and images are not next to this checkout"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips the tests that would start after $ADDENDA_TEST_UNTIL, in seconds since the epoch."""
    if time.time() > float(os.environ.get("ADDENDA_TEST_UNTIL", "inf")):
        pytest.skip("NOT RUN: the time of this stage is over ($ADDENDA_TEST_UNTIL)")


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A temporary activation cache, so that no test writes to the user's own."""
    folder = tmp_path_factory.mktemp("activations")
    os.environ["ADDENDA_CACHE"] = str(folder)
    yield folder
    del os.environ["ADDENDA_CACHE"]


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server, started on first use."""
    with postgres_server() as url:
        yield url


def _database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    if request.param == "sqlite":
        yield Sqlite(tmp_path_factory.mktemp("registries"))
        return
    databases = Postgres(request.getfixturevalue("postgres"))
    yield databases
    databases.close()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """SQLite, then PostgreSQL, for a module's registries."""
    yield from _database(request, tmp_path_factory)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def elsewhere(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """SQLite, then PostgreSQL, for the registry from which tasks are transferred."""
    yield from _database(request, tmp_path_factory)


@pytest.fixture(scope="module")
def their_full_registry(elsewhere: Database) -> str:
    """The location of a closed registry with a row in every table."""
    return travel.fill(elsewhere.new())


@pytest.fixture
def there(their_full_registry: str, elsewhere: Database) -> Iterator[Registry]:
    """A new copy of a registry with a row in every table, whose tasks are transferred to `here`."""
    with Registry.open(elsewhere.copy(their_full_registry), user="ada") as opened:
        yield opened


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with all tasks of a SQLite registry that has a row in every table."""
    folder = tmp_path_factory.mktemp("sent")
    with Registry.open(travel.fill(str(folder / "tasks.db"))) as registry:
        registry.export(sorted(travel.FULL), folder / "all.addenda")
    return folder / "all.addenda"


@pytest.fixture(scope="module")
def an_empty_registry(database: Database) -> str:
    with Registry.open(location := database.new()):
        return location


@pytest.fixture
def here(an_empty_registry: str, database: Database) -> Iterator[Registry]:
    """An empty registry of another user."""
    with Registry.open(database.copy(an_empty_registry), user="bob") as opened:
        yield opened


@pytest.fixture(scope="module")
def shelf(database: Database) -> dict[str, str]:
    """Templates to copy: a registry that has only the backbone, and one with a row in every table."""
    templates = {"book": database.new()}
    with Registry.open(templates["book"]) as registry:
        registry.add_backbone(BACKBONE)
    templates["full"] = database.copy(templates["book"])
    with Registry.open(templates["full"]) as registry:
        fill(registry)
    assert all(rows(templates["full"]).values()), "a table without a row would prove nothing"
    return templates


@pytest.fixture
def book(shelf: dict[str, str], database: Database) -> Iterator[Registry]:
    """A new registry that has the backbone and no task."""
    with Registry.open(database.copy(shelf["book"])) as opened:
        yield opened


@pytest.fixture(scope="module")
def shared_book(shelf: dict[str, str], database: Database) -> Iterator[Registry]:
    """A registry that has the backbone, shared by the tests of rejected changes."""
    with Registry.open(database.copy(shelf["book"])) as opened:
        yield opened


@pytest.fixture
def full_book(shelf: dict[str, str], database: Database) -> Iterator[Registry]:
    """A new registry with a row in every table."""
    with Registry.open(database.copy(shelf["full"])) as opened:
        yield opened


@pytest.fixture(scope="session")
def another_interpreter() -> None:
    """Starts the interpreter that runs functions of a test module in other processes."""
    start_another_interpreter()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs `addenda` on a temporary registry."""
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.setenv("ADDENDA_REGISTRY", str(tmp_path / "tasks.db"))
    return addenda


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A folder with the digits 0 and 1 in train/ and test/ and the registry of a task learned from them; its output."""
    folder = tmp_path_factory.mktemp("first")
    for split, test in (("train", False), ("test", True)):
        data = digits((0, 1), test)
        for number in range(24):
            class_folder = folder / "digits" / split / data.classes[data.targets[number]]
            class_folder.mkdir(parents=True, exist_ok=True)
            data.images[number].save(class_folder / f"{number}.png")
    quick = ("--backbone", "glyphs", "--epochs", "2", "--lr", "0.3")
    result = addenda("learn", "ones", folder / "digits", *quick, "--registry", folder / "tasks.db")
    assert result.code == 0, result.err
    return folder, result


@pytest.fixture
def digits_folder(first: tuple[Path, Result], tmp_path: Path) -> Path:
    """A copy of the digits 0 and 1 that a test may change."""
    return shutil.copytree(first[0] / "digits", tmp_path / "digits")


@pytest.fixture
def learned(first: tuple[Path, Result], tmp_path: Path) -> Result:
    """The output of learning a task, which is copied into the test's registry."""
    shutil.copy(first[0] / "tasks.db", tmp_path)
    return first[1]


@pytest.fixture
def tagged(tmp_path: Path) -> Path:
    """A multi-label listing of digits: 0 has no label, 1 is odd, 2 is even, 3 is odd and high."""
    lines = ["path,labels,split"]
    (tmp_path / "tagged").mkdir()
    for split, test in (("train", False), ("test", True)):
        data = digits((0, 1, 2, 3), test)
        for number in range(48 if split == "train" else 12):
            labels = ("", "odd", "even", "high|odd")[data.targets[number]]
            data.images[number].save(tmp_path / "tagged" / f"{split}-{number}.png")
            lines.append(f"tagged/{split}-{number}.png,{labels},{split}")
    (tmp_path / "tags.csv").write_text("\n".join(lines))
    return tmp_path / "tags.csv"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    required = os.environ.get("ADDENDA_TEST_BROWSER") == "required"
    if required and not CHROMIUM.exists():
        pytest.fail(f"ADDENDA_TEST_BROWSER is 'required', but {CHROMIUM} does not exist")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} does not exist")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def tiny() -> FrozenBackbone:
    return FrozenBackbone(tiny_vit(), "tiny", "hub")


@pytest.fixture(scope="session")
def glyphs() -> FrozenBackbone:
    return load_backbone("glyphs", device="cpu")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path / "tasks.db") as opened:
        yield opened


@pytest.fixture
def registered(registry: Registry, tiny: FrozenBackbone) -> Callable[..., Task]:
    """Registers a random task on `tiny` and returns it with its version."""
    from addenda.combined import golden

    registry.add_backbone(tiny.record())

    def register(name: str, new_version: bool = False, **options: object) -> Task:
        task = random_task(tiny, name, **options)
        return registry.register(task, golden(tiny, task), new_version=new_version)

    return register
