"""Run by Alembic with the connection that Database.migrate() opened."""

from alembic import context

from tunesmith.store.tables import Table

context.configure(connection=context.config.attributes["connection"], target_metadata=Table.metadata)
context.run_migrations()
