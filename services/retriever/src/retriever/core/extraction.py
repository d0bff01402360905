"""What extraction takes and gives, and whether bytes are what they claim to be.

Knows the kinds of files and the limits; the readers of each kind live in backends/extraction. Every refusal is an
INVALID_ARGUMENT whose message can be shown to whoever sent the file.
"""

import unicodedata
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from chassis.errors import Code, PlatformError


class Kind(StrEnum):
    """The media types that can be read."""

    TEXT = "text/plain"
    MARKDOWN = "text/markdown"
    HTML = "text/html"
    PDF = "application/pdf"
    JSONL = "application/jsonl"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one file's extraction."""

    max_chars: int  # of the extracted text
    max_pages: int  # of a PDF
    max_documents: int  # of a JSONL file


@dataclass(frozen=True, slots=True)
class Extracted:
    """One document as it was found in a file."""

    text: str
    title: str = ""
    external_id: str = ""
    metadata: dict[str, object] = field(default_factory=dict)
    line: int = 0  # of a JSONL file, from 1; 0 elsewhere


@dataclass(frozen=True, slots=True)
class Extraction:
    """All that a file held; never empty."""

    documents: list[Extracted]
    num_skipped: int = 0  # lines without text


class Extractor(Protocol):
    """Reads files."""

    async def extract(self, kind: Kind, data: bytes) -> Extraction:
        """Reads a file; raises INVALID_ARGUMENT with the reason where it cannot be read. Ends within its own limits."""
        ...


def kind_of(content_type: str) -> Kind:
    """Returns the kind that a media type names; raises INVALID_ARGUMENT."""
    essence = content_type.split(";", 1)[0].strip().lower()
    try:
        return Kind(essence)
    except ValueError:
        known = ", ".join(Kind)
        raise refused(f"content_type {essence[:100]!r} cannot be ingested; known are {known}", "content_type") from None


def refused(message: str, param: str = "file") -> PlatformError:
    """Makes the error that says why a file is not indexed."""
    return PlatformError(Code.INVALID_ARGUMENT, message, param=param)


def check_content(kind: Kind, data: bytes) -> None:
    """Raises INVALID_ARGUMENT where the bytes are not what the kind says."""
    if not data.strip():
        raise refused("file: it is empty")
    is_pdf = b"%PDF-" in data[:1024]
    if kind is Kind.PDF:
        if not is_pdf:
            raise refused("file: declared application/pdf, but it has no %PDF header")
        return
    for magic, name in _MAGIC:
        if data.startswith(magic):
            raise refused(f"file: declared {kind.value}, but it is {name}")


def decode(kind: Kind, data: bytes) -> str:
    """Reads bytes as the UTF-8 text that they are said to be; raises INVALID_ARGUMENT naming the line."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"byte {data[error.start]:#04x} at {error.start}"
        raise refused(f"file: declared {kind.value}, but line {line} is not UTF-8 ({byte})") from None
    if "\x00" in text:
        line = text.count("\n", 0, text.index("\x00")) + 1
        raise refused(f"file: declared {kind.value}, but line {line} holds a NUL byte, so it is not text")
    sample = text[:65_536]
    num_controls = sum(unicodedata.category(char) == "Cc" and char not in _TEXT_CONTROLS for char in sample)
    if num_controls * 20 > len(sample):
        raise refused(f"file: declared {kind.value}, but more than 5% of it are control characters, so it is not text")
    return text


_TEXT_CONTROLS = frozenset("\t\n\r\f\v\x1b\x85")
_MAGIC = (
    (b"%PDF-", "a PDF"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"PK\x03\x04", "a zip archive (or an Office document)"),
    (b"\x1f\x8b", "gzip data"),
    (b"\x7fELF", "a program"),
    (b"\xff\xfe", "UTF-16 text; send UTF-8"),
    (b"\xfe\xff", "UTF-16 text; send UTF-8"),
)
