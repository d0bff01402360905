"""Reads JSON lines, `{"_id", "title", "text"}` each, into many documents; a bad line is named and refuses the file."""

import json

from chassis.errors import PlatformError
from retriever.core.documents import MAX_EXTERNAL_ID_CHARS, dump_metadata, has_surrogate
from retriever.core.extraction import Extracted, Extraction, Limits, refused


def read_jsonl(text: str, limits: Limits) -> Extraction:
    """Returns a document for each line with text. Blank lines mean nothing; lines without text are counted."""
    documents: list[Extracted] = []
    line_of_id: dict[str, int] = {}
    num_skipped = 0
    # Not splitlines(), which also cuts at characters that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        document = _read_line(number, line)
        if document.external_id:
            first = line_of_id.setdefault(document.external_id, number)
            if first != number:
                raise refused(f"line {number}: _id {document.external_id[:100]!r} was used in line {first} already")
        if not document.text.strip():
            num_skipped += 1
            continue
        documents.append(document)
        if len(documents) > limits.max_documents:
            raise refused(f"line {number}: the file holds more than {limits.max_documents} documents")
    if not documents:
        raise refused("file: no line has any text")
    return Extraction(documents, num_skipped)


def _read_line(number: int, line: str) -> Extracted:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise refused(f"line {number}: it is not JSON ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(entry, dict):
        raise refused(f"line {number}: it must be a JSON object")
    external_id = entry.get("_id", "")
    if isinstance(external_id, int) and not isinstance(external_id, bool):
        external_id = str(external_id)
    title = entry.get("title") or ""
    text = entry.get("text")
    for name, value in (("_id", external_id), ("title", title), ("text", text)):
        if not isinstance(value, str):
            raise refused(f"line {number}: {name} {'must be a string' if name in entry else 'is missing'}")
        if has_surrogate(value):
            raise refused(f"line {number}: {name} contains an unpaired surrogate")
    if len(external_id) > MAX_EXTERNAL_ID_CHARS:
        raise refused(f"line {number}: _id has {len(external_id)} characters, the limit is {MAX_EXTERNAL_ID_CHARS}")
    return Extracted(_with_title(title, str(text)), title, external_id, _metadata(number, entry), number)


def _with_title(title: str, text: str) -> str:
    """Puts the title before a text that does not start with it: it is what such collections are searched by."""
    title = title.strip()
    if not title or text.lstrip().startswith(title):
        return str(text)
    return f"{title}\n\n{text}"


def _metadata(number: int, entry: dict[str, object]) -> dict[str, object]:
    metadata = entry.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise refused(f"line {number}: metadata must be an object")
    try:
        dump_metadata(metadata)
    except PlatformError as error:
        raise refused(f"line {number}: {error.message}") from None
    return metadata
