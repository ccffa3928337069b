"""What alembic runs: the revisions in versions/, on the connection that ``app.store.database.migrate`` holds locked.

Each revision can be taken back, which drops what only it has. A new one is a file in versions/ shaped like
script.py.mako, and ``tests/store/test_migrations.py`` says what it still lacks compared with tables.py.
"""

from alembic import context

from app.store.tables import SCHEMA_VERSION_TABLE, Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=SCHEMA_VERSION_TABLE,
    render_as_batch=True,  # SQLite cannot alter most things in place
)
with context.begin_transaction():
    context.run_migrations()
