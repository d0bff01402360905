"""What is indexed: documents, their chunks, and the names that both go by.

Knows nothing of where a document came from or where its chunks are kept. Whatever may stand in a store's filter passes
one of the patterns below first; free text (titles, external ids, metadata) never does.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from chassis.errors import Code, PlatformError

DEFAULT_COLLECTION = "default"
MAX_EXTERNAL_ID_CHARS = 512
MAX_TITLE_CHARS = 512
MAX_METADATA_BYTES = 16 * 1024

# \Z and not $, which would let a trailing newline pass.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}\Z")


@dataclass(frozen=True)  # no slots: the digest is kept
class Document:
    """A document before it is cut: its whole text, and what is told about it with every hit."""

    document_id: str
    upload_id: str  # the document's own id, or that of the upload that held several
    tenant: str
    collection: str
    external_id: str  # "" for none
    title: str
    text: str
    metadata_json: str  # a JSON object

    @cached_property
    def content_sha256(self) -> str:
        """sha256 of the indexed text, hex."""
        return sha256_hex(self.text)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document as the store keeps it, without its vector."""

    tenant: str
    collection: str
    document_id: str
    upload_id: str
    external_id: str
    title: str
    text: str
    metadata_json: str
    ordinal: int
    num_chunks: int  # of the whole document, in this revision
    content_sha256: str
    revision: str
    encoder_version: str
    job_id: str
    indexed_unix_s: int

    @property
    def chunk_id(self) -> str:
        """The chunk's name towards clients."""
        return chunk_id(self.document_id, self.ordinal)

    @property
    def key(self) -> str:
        """The store's primary key."""
        return chunk_key(self.tenant, self.document_id, self.revision, self.ordinal)


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """Which chunk the store has."""

    key: str
    document_id: str
    upload_id: str
    external_id: str
    collection: str
    ordinal: int
    revision: str
    indexed_unix_s: int
    job_id: str


def chunk_id(document_id: str, ordinal: int) -> str:
    """Names a chunk within its tenant."""
    return f"{document_id}-{ordinal}"


def chunk_key(tenant: str, document_id: str, revision: str, ordinal: int) -> str:
    """Names a chunk in the store: two tenants, or two revisions of a document, never share a key."""
    return f"{tenant}/{document_id}/{revision}/{ordinal}"


def external_key(external_id: str) -> str:
    """Returns a hex digest that stands for a client's own id wherever a filter needs it; "" for none."""
    return sha256_hex(external_id)[:32] if external_id else ""


def derived_document_id(tenant: str, collection: str, external_id: str) -> str:
    """Names a document by its client's id, just as the gateway does, so that a later upload of that id replaces it."""
    return "doc_" + sha256_hex("\0".join((tenant, collection, external_id)))[:32]


def line_document_id(upload_id: str, line: int) -> str:
    """Names a line of an upload that has no id of its own."""
    return "doc_" + sha256_hex(json.dumps([upload_id, line]))[:32]


def revision_of(document: Document, *, encoder_version: str, chunk_tokens: int, overlap_tokens: int) -> str:
    """Digests all that a document's stored chunks depend on: equal revisions have equal rows."""
    parts = [
        document.collection,
        document.upload_id,
        document.external_id,
        document.title,
        document.metadata_json,
        document.content_sha256,
        encoder_version,
        chunk_tokens,
        overlap_tokens,
    ]
    return sha256_hex(json.dumps(parts))[:16]


def sha256_hex(text: str) -> str:
    """Digests a text as UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def check_tenant(tenant: str) -> str:
    """Returns the tenant id; raises INVALID_ARGUMENT for one that could mean something to a filter."""
    if not _NAME.match(tenant):
        raise _invalid("tenant", "a tenant id has 1 to 64 letters, digits, '.', '_' or '-'")
    return tenant


def check_collection(collection: str) -> str:
    """Returns the collection's name, "default" for none; raises INVALID_ARGUMENT."""
    if not collection:
        return DEFAULT_COLLECTION
    if not _NAME.match(collection):
        raise _invalid("collection", "a collection name has 1 to 64 letters, digits, '.', '_' or '-'")
    return collection


def check_id(value: str, param: str = "document_id") -> str:
    """Returns a document, upload or job id; raises INVALID_ARGUMENT."""
    if not _ID.match(value):
        raise _invalid(param, f"{param} has 1 to 128 letters, digits, '.', '_', ':' or '-'")
    return value


def check_external_id(external_id: str) -> str:
    """Returns the client's own id; raises INVALID_ARGUMENT for one too long to keep or not encodable."""
    if len(external_id) > MAX_EXTERNAL_ID_CHARS:
        raise _invalid("external_id", f"external_id has {len(external_id)} characters, the limit is 512")
    if has_surrogate(external_id):
        raise _invalid("external_id", "external_id contains an unpaired surrogate")
    return external_id


def check_metadata(metadata_json: str) -> dict[str, object]:
    """Returns a document's metadata; raises INVALID_ARGUMENT where it is no JSON object or too large."""
    if not metadata_json:
        return {}
    if len(metadata_json.encode(errors="replace")) > MAX_METADATA_BYTES:
        raise _invalid("metadata", f"metadata is larger than {MAX_METADATA_BYTES} bytes")
    try:
        metadata = json.loads(metadata_json)
    except (ValueError, RecursionError) as error:
        raise _invalid("metadata", "metadata is not valid JSON") from error
    if not isinstance(metadata, dict):
        raise _invalid("metadata", "metadata must be a JSON object")
    return metadata


def dump_metadata(metadata: Mapping[str, object]) -> str:
    """Writes metadata in one canonical form, within the store's limit; raises INVALID_ARGUMENT."""
    try:
        text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise _invalid("metadata", "metadata holds a number that JSON cannot carry, or is nested too deeply") from error
    if len(text) > MAX_METADATA_BYTES:  # ASCII: json.dumps escapes everything else
        raise _invalid("metadata", f"metadata is larger than {MAX_METADATA_BYTES} bytes")
    return text


def clean_title(title: str) -> str:
    """Makes a title one line of at most 512 characters."""
    return " ".join(clean_text(title).split())[:MAX_TITLE_CHARS]


def clean_text(text: str) -> str:
    """Unifies line ends and drops what no store or wire format carries: NUL and unpaired surrogates."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "")
    return _SURROGATE.sub("\ufffd", text)


def has_surrogate(text: str) -> bool:
    """Tells whether UTF-8 cannot carry the text."""
    return _SURROGATE.search(text) is not None


_SURROGATE = re.compile("[\ud800-\udfff]")


def _invalid(param: str, message: str) -> PlatformError:
    return PlatformError(Code.INVALID_ARGUMENT, message, param=param)
