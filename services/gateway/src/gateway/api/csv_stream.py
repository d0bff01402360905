"""CSV as RFC 4180 has it, written page by page, and safe to open in a spreadsheet."""

import csv
import io
from collections.abc import Mapping, Sequence

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def csv_page(names: Sequence[str], rows: Sequence[Mapping[str, object]], *, with_header: bool) -> bytes:
    """Writes some rows, CRLF after each. What a spreadsheet would run as a formula gets an apostrophe before it."""
    page = io.StringIO()
    writer = csv.writer(page, lineterminator="\r\n")
    if with_header:
        writer.writerow(names)
    writer.writerows([_defused(row[name]) for name in names] for row in rows)
    return page.getvalue().encode()


def _defused(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
