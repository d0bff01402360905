"""Reports of usage from SQLite. Implements core.usage_reports.UsageReports.

Sums come from tables that the ledger keeps in step with its rows (usage_totals, usage_days): no million rows are read.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

from gateway.backends.sqlite import Database
from gateway.core.money import MS_PER_DAY
from gateway.core.usage_reports import FIGURES, MAX_GROUPS, ROW, Cell, Group, Selection

_LAST_DAY = 2_932_896  # of the year 9999


class SqliteUsage:
    """Reads the tables usage, usage_totals and usage_days."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def sums(
        self, groups: Sequence[Group], selection: Selection, limit: int = MAX_GROUPS
    ) -> list[Mapping[str, Cell]]:
        """See UsageReports.sums."""
        columns = [group.column for group in groups]
        by_day = Group.DAY in groups or selection.first_day is not None or selection.last_day is not None
        conditions, values = _conditions(selection)
        if by_day:
            conditions.append("day BETWEEN ? AND ?")
            values += [selection.first_day or 0, _LAST_DAY if selection.last_day is None else selection.last_day]
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        grouped = f"GROUP BY {', '.join(columns)} ORDER BY {', '.join(columns)}" if columns else ""
        having = "" if columns else "HAVING count(*) > 0"
        statement = (
            f"SELECT {', '.join([*columns, *(f'sum({figure})' for figure in FIGURES)])} "
            f"FROM {'usage_days' if by_day else 'usage_totals'} {where} {grouped} {having} LIMIT ?"
        )
        names = [*columns, *FIGURES]

        def query(connection: sqlite3.Connection) -> list[Mapping[str, Cell]]:
            rows = connection.execute(statement, (*values, limit))
            return [_named_day(dict(zip(names, row, strict=True))) for row in rows]

        return await self._database.read(query)

    async def rows(
        self, selection: Selection, after: tuple[int, int], limit: int
    ) -> tuple[list[Mapping[str, Cell]], tuple[int, int]]:
        """See UsageReports.rows."""
        conditions, values = _conditions(selection)
        first_ms, last_ms = _span(selection)
        where = " AND ".join([*conditions, "(started_unix_ms, id) > (?, ?)", "started_unix_ms BETWEEN ? AND ?"])
        statement = f"SELECT {', '.join(ROW)} FROM usage WHERE {where} ORDER BY started_unix_ms, id LIMIT ?"

        def query(connection: sqlite3.Connection) -> list[Mapping[str, Cell]]:
            found = connection.execute(statement, (*values, *after, first_ms, last_ms, limit))
            return [dict(zip(ROW, row, strict=True)) for row in found]

        rows = await self._database.read(query)
        last = rows[-1] if rows else None
        return rows, (int(last["started_unix_ms"]), int(last["id"])) if last else after


def _conditions(selection: Selection) -> tuple[list[str], list[Cell]]:
    wanted = {"tenant": selection.tenant, "key_id": selection.key_id, "model": selection.model}
    given = {column: value for column, value in wanted.items() if value is not None}
    return [f"{column} = ?" for column in given], list(given.values())


def _span(selection: Selection) -> tuple[int, int]:
    """The selection's days in milliseconds, for the index."""
    last_day = _LAST_DAY if selection.last_day is None else selection.last_day
    return (selection.first_day or 0) * MS_PER_DAY, (last_day + 1) * MS_PER_DAY - 1


def _named_day(row: dict[str, Cell]) -> Mapping[str, Cell]:
    if "day" in row:
        row["day"] = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=int(row["day"]))).date().isoformat()
    return row
