"""How commands print: data as JSON where asked for, tables of plain text, examples in every help."""

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime


def examples(*lines: str) -> str:
    """Returns a help's closing part with commands to copy."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def print_json(data: object) -> None:
    """Prints data for programs."""
    print(json.dumps(data, indent=2 if sys.stdout.isatty() else None, ensure_ascii=False))


def print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints columns as wide as their widest cell."""
    cells = [list(head), *[["-" if cell is None else str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def day(unix_s: int | None) -> str | None:
    """Writes the day of a moment, in UTC."""
    return None if unix_s is None else f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d}"


def moment(unix_s: float) -> str:
    """Writes a moment, in UTC."""
    return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d %H:%M:%SZ}"
