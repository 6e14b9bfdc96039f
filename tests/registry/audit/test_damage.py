"""Damaged rows and artifacts are detected and named; the other tasks keep working."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from addenda.exceptions import IntegrityError, RegistryError
from addenda.registry import Registry
from addenda.registry.store.upgrade import schema_faults
from tests.support.databases import ON_SQLITE, raw, rows, tamper
from tests.support.registries import HERE, a_task, keep, same_content


@pytest.mark.parametrize("index", [0, 10, -1])
def test_a_flipped_byte_of_an_artifact_is_found(full_book, index):
    keep(full_book, a_task("birds", 8))
    data = bytearray(full_book.get("strokes").artifact)
    data[index] ^= 1
    sha256 = full_book.record("strokes").sha256
    sql = "UPDATE artifact SET data = :data WHERE sha256 = :sha256"
    tamper(full_book, "artifact", sql, data=bytes(data), sha256=sha256)
    with pytest.raises(IntegrityError, match=f"'strokes:1' cannot be trusted: .* sha256 {sha256[:16]}… .*changed"):
        full_book.get("strokes")
    with pytest.raises(IntegrityError, match="Task 'digits:1' cannot be trusted: Task 'strokes:1'"):
        full_book.get("digits")
    with pytest.raises(IntegrityError, match="'strokes:1'"):
        full_book.load(HERE)
    assert same_content(full_book.get("birds"), a_task("birds", 8))
    assert full_book.get("old:1").version == 1
    assert len(full_book.tasks()) == 3


@pytest.mark.parametrize(
    ("table", "sql"),
    [
        ("task", """UPDATE task SET labels = '["zero","one","three"]' WHERE name = 'digits'"""),
        ("task", f"UPDATE task SET backbone = '{'c' * 64}' WHERE name = 'digits'"),
        ("task", "UPDATE task SET objective = 'multi-label' WHERE name = 'digits'"),
        ("task", "UPDATE task SET artifact = 'gone' WHERE name = 'digits'"),
        ("task_parent", "UPDATE task_parent SET parent_id = 3"),
        ("task_parent", "UPDATE task_parent SET parent_id = 99"),
    ],
)
def test_a_changed_column_is_found(full_book, table, sql):
    tamper(full_book, table, sql)
    with pytest.raises(IntegrityError, match="Task 'digits:1' cannot be trusted"):
        full_book.get("digits:1")
    assert full_book.get("strokes").version == 1


@ON_SQLITE
@pytest.mark.parametrize("column", ["labels", "config", "metrics", "data"])
def test_invalid_json_in_an_sqlite_column_is_a_registry_error(full_book, column):
    tamper(full_book, "task", f"UPDATE task SET {column} = '[' WHERE name = 'digits'")
    before = rows(full_book)
    for ask in (lambda: full_book.get("digits"), lambda: full_book.load(HERE), full_book.tasks):
        with pytest.raises(RegistryError, match="The registry cannot be read: a record is damaged"):
            ask()
    with pytest.raises(RegistryError, match=r"Task 'digits' was not retired: Expecting value.*Nothing was changed"):
        full_book.retire("digits")
    assert rows(full_book) == before
    assert full_book.get("strokes").version == 1


def test_a_missing_artifact_is_found(full_book):
    sha256 = full_book.record("digits").sha256
    tamper(full_book, "artifact", "DELETE FROM artifact WHERE sha256 = :sha256", sha256=sha256)
    with pytest.raises(IntegrityError, match="Task 'digits:1' cannot be trusted: its artifact is missing"):
        full_book.get("digits")


def test_a_missing_parent_is_found(full_book):
    tamper(full_book, "task_parent", "DELETE FROM task_parent")
    with pytest.raises(IntegrityError, match=r"'digits:1' cannot be trusted: it extends a task .* that is missing"):
        full_book.get("digits")


@pytest.mark.parametrize(
    ("column", "value"), [("logits", bytes(48)), ("logits", b""), ("digest", "other")], ids=["zeros", "none", "digest"]
)
def test_a_changed_golden_probe_is_found(full_book, column, value):
    sql = f"UPDATE golden SET {column} = :value WHERE task_id = 2 AND numerics_fingerprint = :numerics"
    tamper(full_book, "golden", sql, value=value, numerics="n" * 64)
    with pytest.raises(IntegrityError, match="Task 'digits:1': its golden probe's stored bytes have changed"):
        full_book.goldens("digits")
    assert len(full_book.goldens("strokes")) == 1


@ON_SQLITE
@pytest.mark.parametrize("table", ["sqlite_schema", "task", "artifact", "event"])
def test_a_damaged_page_of_an_sqlite_file_is_a_registry_error(full_book, table):
    with raw(full_book) as connection:
        root = connection.scalar(text("SELECT rootpage FROM sqlite_schema WHERE name = :table"), {"table": table})
        size = connection.scalar(text("PRAGMA page_size"))
    full_book.close()
    page = root or 1
    with open(full_book.location, "r+b") as file:
        file.seek(page * size - size // 2)
        file.write(b"\xff" * (size // 2))
        file.seek((page - 1) * size + (100 if page == 1 else 0))
        file.write(b"\xff" * 100)
    with pytest.raises(RegistryError, match="malformed"), Registry.open(full_book.location) as damaged:
        pytest.fail(f"read as {damaged.tasks()}, {damaged.generation}, {damaged.load(HERE)}")


@ON_SQLITE
def test_a_dangling_reference_in_sqlite_is_a_fault(full_book):
    sha256 = full_book.record("digits").sha256
    with raw(full_book) as connection:
        connection.execute(text("DROP TRIGGER artifact_no_delete"))
        connection.execute(text("DELETE FROM artifact WHERE sha256 = :sha256"), {"sha256": sha256})
    assert schema_faults(full_book._engine)[0].startswith("foreign key: ('task', 2, 'artifact',")
