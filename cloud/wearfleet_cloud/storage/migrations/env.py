"""Lets alembic work on the connection that ``Database`` passes; there is no other way to run it."""

from alembic import context

from wearfleet_cloud.storage.tables import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    transactional_ddl=True,
    render_as_batch=True,
)
context.run_migrations()
