"""Copies the contents of a database into another one, also between SQLite and PostgreSQL."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import LargeBinary, Table, func, insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.tables import Base

# The rows that are read and written at a time; fewer if they contain whole images.
_ROWS_AT_ONCE = 1000
_BYTES_AT_ONCE = 16 * 2**20


async def copy_rows(source: AsyncConnection, target: AsyncConnection) -> dict[str, int]:
    """Copy the rows and the id counters of all tables; return the number of rows by table.

    Memory does not grow with the tables. The tables of the target are empty.

    Args:
        source: in a transaction that sees one consistent state.
        target: in a transaction that the caller commits.
    """
    copied = {}
    for table in Base.metadata.sorted_tables:
        count, at_once = 0, await _rows_at_once(source, table)
        rows = await source.stream(select(table).execution_options(yield_per=at_once))
        async for part in rows.mappings().partitions(at_once):
            await target.execute(insert(table), [dict(row) for row in part])
            count += len(part)
        copied[table.name] = count
    await _set_id_counters(target, await _last_ids(source))
    return copied


async def delete_rows(connection: AsyncConnection) -> None:
    """Delete the rows of every table."""
    for table in reversed(Base.metadata.sorted_tables):
        await connection.execute(table.delete())


async def row_counts(connection: AsyncConnection) -> dict[str, int]:
    """Return the number of rows of each table."""
    return {
        table.name: (await connection.execute(select(func.count()).select_from(table))).scalar_one()
        for table in Base.metadata.sorted_tables
    }


async def _rows_at_once(connection: AsyncConnection, table: Table) -> int:
    blobs = [func.coalesce(func.max(func.length(each)), 0) for each in table.c if isinstance(each.type, LargeBinary)]
    if not blobs:
        return _ROWS_AT_ONCE
    longest = sum((await connection.execute(select(*blobs))).one())
    return max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // max(longest, 1)))


def _counting_tables() -> list[Table]:
    """Return the tables whose ids the database assigns."""
    return [table for table in Base.metadata.sorted_tables if table.autoincrement_column is not None]


async def _last_ids(connection: AsyncConnection) -> Mapping[str, int]:
    """Return the last assigned id of each table; its row may be deleted."""
    counted = {}
    for table in _counting_tables():
        if connection.dialect.name == "postgresql":
            sequence = await _sequence_of(connection, table)
            last = await connection.scalar(text(f"SELECT CASE WHEN is_called THEN last_value END FROM {sequence}"))  # noqa: S608 - a name that the database itself gave
        else:
            last = await _sqlite_sequence(connection, table)
        greatest: Any = await connection.scalar(select(func.max(table.c.id)))
        counted[table.name] = max(last or 0, greatest or 0)
    return counted


async def _set_id_counters(connection: AsyncConnection, counted: Mapping[str, int]) -> None:
    """Set the id counters, so that no assigned id is assigned again."""
    for table in _counting_tables():
        last = counted[table.name]
        if connection.dialect.name == "postgresql":
            sequence = await _sequence_of(connection, table)
            await connection.execute(
                text("SELECT setval(:sequence, :value, :called)"),
                {"sequence": sequence, "value": max(last, 1), "called": last > 0},
            )
        elif table.dialect_options["sqlite"]["autoincrement"]:
            name = {"name": table.name}
            await connection.execute(text("DELETE FROM sqlite_sequence WHERE name = :name"), name)
            await connection.execute(
                text("INSERT INTO sqlite_sequence (name, seq) VALUES (:name, :last)"), name | {"last": last}
            )


async def _sqlite_sequence(connection: AsyncConnection, table: Table) -> int | None:
    if not table.dialect_options["sqlite"]["autoincrement"]:
        return None  # SQLite uses the largest id plus one
    name = {"name": table.name}
    last: int | None = await connection.scalar(text("SELECT seq FROM sqlite_sequence WHERE name = :name"), name)
    return last


async def _sequence_of(connection: AsyncConnection, table: Table) -> str:
    found = await connection.scalar(text("SELECT pg_get_serial_sequence(:name, 'id')"), {"name": table.name})
    assert isinstance(found, str), f"{table.name} counts on nothing"
    return found
