"""Schema versions, oldest first, applied by alembic when a database is opened."""
