"""Schema upgrades, and checks of a database's schema."""

from __future__ import annotations

from pathlib import Path
from threading import Lock

from sqlalchemy import Connection, Engine, inspect, text

from addenda.exceptions import RegistryError
from addenda.registry.store.database import database_errors, display_location, reading, use_wal, writing
from addenda.registry.store.schema import metadata, wrong_triggers

VERSION_TABLE = "addenda_version"
_MIGRATIONS = Path(__file__).parents[1] / "migrations"
_MIGRATING = Lock()
"""Alembic's operations are global to the process: two threads would migrate each other's database."""


def upgrade(engine: Engine, create: bool) -> None:
    """Creates the schema if there is none and `create` is set, or upgrades an older one, in one transaction."""
    location = display_location(engine)
    with database_errors(f"Registry {location!r} cannot be opened"):
        with engine.connect() as connection:
            version = revision(connection)
            if version is None and inspect(connection).get_table_names():
                raise RegistryError(
                    f"{location!r} is another program's database, not a registry; give another location."
                )
        if version is None and not create:
            raise RegistryError(
                f"There is no registry at {location!r}; check the location. `addenda learn` creates one at --registry."
            )
        if version is not None and version not in _versions():
            raise RegistryError(
                f"The registry has schema {version!r}, from a newer version of Addenda. Upgrade Addenda to open it."
            )
        if engine.dialect.name == "sqlite":
            use_wal(engine)
        if version != _versions()[-1]:
            with writing(engine) as connection:
                migrate(connection)


def migrate(connection: Connection, revision: str = "head") -> None:
    """Runs the migrations up to a revision, in the connection's transaction."""
    from alembic import command  # imported only for upgrades
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(_MIGRATIONS))
    with _MIGRATING:
        command.upgrade(config, revision)


def check_readable(engine: Engine) -> None:
    """Raises RegistryError unless the schema is this version's and has no foreign views or triggers; only reads."""
    location = display_location(engine)
    with reading(engine) as connection:
        version, head = revision(connection), _versions()[-1]
        views, tables = set(inspect(connection).get_view_names()), set(metadata.tables)
        if connection.dialect.name == "sqlite":
            virtual = "SELECT name FROM sqlite_schema WHERE sql LIKE 'CREATE VIRTUAL%'"
            foreign = views | set(connection.scalars(text(virtual)))
        else:  # a shared schema may have views of other programs
            foreign = views & tables
        foreign |= {name for name in wrong_triggers(connection) if name.rpartition("_no_")[0] not in tables}
    if version is None:
        raise RegistryError(f"There is no registry at {location!r}; check the location.")
    if version != head:
        raise RegistryError(
            f"{location!r} has schema {version!r}, this version of Addenda reads {head!r}, and a read-only registry "
            "is not upgraded. Copy it, and upgrade the copy with `addenda db upgrade`."
        )
    if foreign:
        raise RegistryError(
            f"{location!r} contains {min(foreign)!r}, a view, virtual table or trigger that is not part of a "
            "registry; it is not read."
        )


def revision(connection: Connection) -> str | None:
    """The schema's version; None if there is no registry."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    version: str | None = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))
    return version


def _versions() -> list[str]:
    """All schema versions, the newest last."""
    return sorted(path.name.partition("_")[0] for path in _MIGRATIONS.glob("versions/0*.py"))


def schema_faults(engine: Engine) -> list[str]:
    """Faults of the tables, columns, indexes and triggers, and on SQLite of the file."""
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    with reading(engine) as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        faults = [f"schema: {difference}" for difference in compare_metadata(context, metadata)]
        if connection.dialect.name == "sqlite":
            messages = connection.scalars(text("PRAGMA integrity_check")).all()
            faults += [f"file: {message}" for message in messages if message != "ok"]
            faults += [f"foreign key: {tuple(row)}" for row in connection.execute(text("PRAGMA foreign_key_check"))]
        return faults + [f"trigger: {name} is missing, changed or unexpected" for name in wrong_triggers(connection)]
