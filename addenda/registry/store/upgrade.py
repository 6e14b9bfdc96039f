"""Brings a registry's schema up to date, and says whether it is what this version expects."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, inspect, text

from addenda.exceptions import RegistryError
from addenda.registry.store.database import database_errors, described, reading, use_wal, writing
from addenda.registry.store.schema import metadata, wrong_triggers

if TYPE_CHECKING:
    from alembic.config import Config

VERSION_TABLE = "addenda_version"
_MIGRATIONS = Path(__file__).parents[1] / "migrations"
_MIGRATING = Lock()
"""Alembic's operations belong to the process: two threads would migrate each other's database."""


def upgrade(engine: Engine, create: bool) -> None:
    """Makes the schema where there is none and may be one, or upgrades an older one; wholly or not at all."""
    where = described(engine)
    with database_errors(f"Registry {where!r} cannot be opened"):
        with engine.connect() as connection:
            found = revision(connection)
            if found is None and inspect(connection).get_table_names():
                raise RegistryError(f"{where!r} is another program's database, not a registry.")
        if found is None and not create:
            raise RegistryError(
                f"There is no registry at {where!r}: check the place. `addenda learn` makes one where --registry says."
            )
        if found is not None and found not in _versions():
            raise RegistryError(
                f"The registry's schema is {found!r}, from a newer version of Addenda. Upgrade Addenda to open it."
            )
        if engine.dialect.name == "sqlite":
            use_wal(engine)
        if found == _versions()[-1]:
            return
        from alembic import command  # a registry that is up to date starts no Alembic

        config = _config()
        with _MIGRATING, writing(engine) as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def check_readable(engine: Engine) -> None:
    """Refuses what is no registry of this version's schema, or holds views or triggers that none has; it only reads."""
    where = described(engine)
    with reading(engine) as connection:
        found, head = revision(connection), _versions()[-1]
        views, tables = set(inspect(connection).get_view_names()), set(metadata.tables)
        if connection.dialect.name == "sqlite":
            virtual = "SELECT name FROM sqlite_schema WHERE sql LIKE 'CREATE VIRTUAL%'"
            foreign = views | set(connection.scalars(text(virtual)))
        else:  # others' views may stand in a schema that is shared
            foreign = views & tables
        foreign |= {name for name in wrong_triggers(connection) if name.rpartition("_no_")[0] not in tables}
    if found is None:
        raise RegistryError(f"There is no registry at {where!r}: check the place.")
    if found != head:
        raise RegistryError(
            f"{where!r} has the schema {found!r} and this version reads {head!r}; it is only read, so it was not "
            "upgraded. Copy it, and open the copy with `addenda db upgrade`."
        )
    if foreign:
        raise RegistryError(f"{where!r} holds {min(foreign)!r}, which no registry has: it is not read.")


def revision(connection: Connection) -> str | None:
    """The schema's version; None where there is no registry."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    found: str | None = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))
    return found


def _versions() -> list[str]:
    """Every version of the schema, the newest last."""
    return sorted(path.name.partition("_")[0] for path in _MIGRATIONS.glob("versions/0*.py"))


def schema_faults(engine: Engine) -> list[str]:
    """What of the schema is not as this version made it: tables, columns, indexes, triggers, on SQLite the file."""
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    with reading(engine) as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        faults = [f"schema: {difference}" for difference in compare_metadata(context, metadata)]
        if connection.dialect.name == "sqlite":
            said = connection.scalars(text("PRAGMA integrity_check")).all()
            faults += [f"file: {line}" for line in said if line != "ok"]
            faults += [f"foreign key: {tuple(row)}" for row in connection.execute(text("PRAGMA foreign_key_check"))]
        return faults + [f"trigger: {name} is missing, changed, or not ours" for name in wrong_triggers(connection)]


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    return config
