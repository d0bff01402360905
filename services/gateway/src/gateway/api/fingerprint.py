"""What tells one request's body from another's: a hash that is made while the body passes.

Forms are hashed part by part: a client that sends a form again chooses another boundary.
"""

import hashlib
from typing import TYPE_CHECKING, Protocol

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from chassis.errors import Code, PlatformError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks


class Fingerprint(Protocol):
    """A hash in the making."""

    def add(self, piece: bytes) -> None:
        """The next piece of the body."""
        ...

    def digest(self) -> bytes:
        """The hash of what has passed."""
        ...


class BytesFingerprint:
    """The hash of the bytes as they are."""

    def __init__(self, about: bytes) -> None:
        self._hash = hashlib.sha256(about)

    def add(self, piece: bytes) -> None:
        """The next piece of the body."""
        self._hash.update(piece)

    def digest(self) -> bytes:
        """The hash of what has passed."""
        return self._hash.digest()


class FormFingerprint:
    """The hash of a form's parts, whatever its boundary. Of a body that is no form: of the parts before that shows."""

    def __init__(self, about: bytes, boundary: bytes) -> None:
        self._hash = hashlib.sha256(about)
        self._part_bytes = 0
        self._is_form = True
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin,
            "on_header_field": self._take,
            "on_header_value": self._take,
            "on_header_end": self._end,
            "on_headers_finished": self._end,
            "on_part_data": self._take,
            "on_part_end": self._end,
        }
        self._parser = MultipartParser(boundary, callbacks)

    def add(self, piece: bytes) -> None:
        """The next piece of the body."""
        if not self._is_form:
            return
        try:
            self._parser.write(piece)
        except FormParserError:  # the route says so in its answer
            self._is_form = False

    def digest(self) -> bytes:
        """The hash of what has passed."""
        return self._hash.digest()

    def _begin(self) -> None:
        self._hash.update(b"part\0")

    def _take(self, data: bytes, start: int, end: int) -> None:
        self._hash.update(data[start:end])
        self._part_bytes += end - start

    def _end(self) -> None:
        # With the length nothing can pass for the beginning of what follows it.
        self._hash.update(b"\0%d\0" % self._part_bytes)
        self._part_bytes = 0


def fingerprint_of(about: bytes, content_type: str) -> Fingerprint:
    """The kind of hash that a body of the type needs; `about` is what else tells requests apart.

    Raises INVALID_ARGUMENT for a form without a boundary that could be one.
    """
    media_type, options = parse_options_header(content_type)
    if not media_type.startswith(b"multipart/"):
        return BytesFingerprint(about)
    try:
        return FormFingerprint(about, options.get(b"boundary", b""))
    except FormParserError as error:
        raise PlatformError(Code.INVALID_ARGUMENT, f"the form is not valid: {error}", param="content-type") from None
