"""What an upload is, and whether it is what it claims: cheap checks at the door, before a job is made of it.

Reading a document in earnest is the retriever's work. Knows nothing of HTTP or of files.
"""

import codecs
import json
from pathlib import PurePosixPath

from chassis.errors import Code, PlatformError

TEXT, MARKDOWN, HTML, PDF, JSONL = (
    "text/plain",
    "text/markdown",
    "text/html",
    "application/pdf",
    "application/jsonl",
)
MEDIA_TYPES = (TEXT, MARKDOWN, HTML, PDF, JSONL)

_ALIASES = {
    "text/x-markdown": MARKDOWN,
    "application/xhtml+xml": HTML,
    "application/x-pdf": PDF,
    "application/x-ndjson": JSONL,
    "application/ndjson": JSONL,
    "application/jsonlines": JSONL,
    "application/x-jsonlines": JSONL,
    "application/json-lines": JSONL,
}
_SUFFIXES = {
    ".txt": TEXT,
    ".text": TEXT,
    ".md": MARKDOWN,
    ".markdown": MARKDOWN,
    ".htm": HTML,
    ".html": HTML,
    ".xhtml": HTML,
    ".pdf": PDF,
    ".jsonl": JSONL,
    ".ndjson": JSONL,
}
# What clients declare when they do not know better: the file's name says more.
_VAGUE = frozenset({"", "application/octet-stream", "binary/octet-stream", "text/plain"})
_HEAD_BYTES = 64 * 1024
_PDF_WITHIN = 1024  # readers accept the header anywhere in the first 1024 bytes


def media_type_of(declared: str | None, filename: str | None) -> str:
    """Returns one of MEDIA_TYPES; raises UNSUPPORTED_MEDIA_TYPE for anything else."""
    essence = (declared or "").split(";", 1)[0].strip().lower()
    by_name = _SUFFIXES.get(PurePosixPath(filename or "").suffix.lower())
    if essence in _VAGUE and by_name is not None:
        return by_name
    found = _ALIASES.get(essence, essence)
    if found in MEDIA_TYPES:
        return found
    what = repr(essence[:100]) if essence else "a file of no known type"
    raise PlatformError(
        Code.UNSUPPORTED_MEDIA_TYPE, f"{what} cannot be ingested; send one of {', '.join(MEDIA_TYPES)}", param="file"
    )


class NotEmpty:
    """Lets every file pass that has a byte: what is in it is judged by the job that reads it."""

    def __init__(self, param: str) -> None:
        self._param = param
        self._is_empty = True

    def feed(self, piece: bytes) -> None:
        """Takes the next bytes."""
        self._is_empty = self._is_empty and not piece

    def finish(self) -> None:
        """Judges the whole."""
        if self._is_empty:
            raise PlatformError(Code.INVALID_ARGUMENT, f"{self._param} is empty", param=self._param)


class Inspector:
    """Looks at the bytes of an upload as they pass; feed() and finish() raise PlatformError naming `param`."""

    def __init__(self, media_type: str, param: str = "file") -> None:
        self._media_type = media_type
        self._param = param
        self._head = bytearray()
        self._is_blank = True
        self._decoder = codecs.getincrementaldecoder("utf-8")() if media_type != PDF else None

    def feed(self, piece: bytes) -> None:
        """Takes the next bytes."""
        if len(self._head) < _HEAD_BYTES:
            self._head += piece[: _HEAD_BYTES - len(self._head)]
        if self._decoder is None:
            self._is_blank = self._is_blank and not piece
            return
        if b"\0" in piece:
            raise self._mismatch("it holds NUL bytes, so it is not text")
        try:
            text = self._decoder.decode(piece)
        except UnicodeDecodeError as error:
            raise self._mismatch(f"it is not UTF-8 text ({error.reason})") from None
        self._is_blank = self._is_blank and not text.strip("\ufeff \t\r\n\f\v")

    def finish(self) -> None:
        """Judges the whole."""
        if self._decoder is not None:
            try:
                self._decoder.decode(b"", final=True)
            except UnicodeDecodeError as error:
                raise self._mismatch(f"it is not UTF-8 text ({error.reason})") from None
        if self._is_blank:
            raise PlatformError(Code.INVALID_ARGUMENT, f"{self._param} is empty", param=self._param)
        has_pdf_header = b"%PDF-" in self._head[:_PDF_WITHIN]
        if self._media_type == PDF and not has_pdf_header:
            raise self._mismatch("it has no %PDF header")
        if self._media_type != PDF and self._head.startswith(b"%PDF-"):
            raise self._mismatch("it is a PDF")
        if self._media_type == JSONL:
            self._check_first_line()

    def _check_first_line(self) -> None:
        line, newline, _ = bytes(self._head).lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")
        if not newline and len(self._head) >= _HEAD_BYTES:
            return  # a first line longer than what is kept: the worker will see
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise self._mismatch("its first line is not JSON") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise PlatformError(
                Code.INVALID_ARGUMENT, 'each line must be an object with a "text" of type string', param=self._param
            )

    def _mismatch(self, why: str) -> PlatformError:
        message = f"{self._param} is not {self._media_type}: {why}"
        return PlatformError(Code.UNSUPPORTED_MEDIA_TYPE, message, param=self._param)
