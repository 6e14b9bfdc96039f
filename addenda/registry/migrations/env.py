"""Runs the migrations on the connection that `store/upgrade.py` passes, within its transaction."""

from alembic import context

from addenda.registry.store.schema import metadata
from addenda.registry.store.upgrade import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
