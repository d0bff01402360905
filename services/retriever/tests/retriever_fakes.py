"""Stand-ins for what the retriever asks of others: an encoder, an index, files; and small files of every kind."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from chassis.errors import Code, PlatformError
from retriever.core.chunking import TokenPlaces
from retriever.core.documents import (
    Chunk,
    ChunkRef,
    check_collection,
    check_id,
    check_tenant,
    external_key,
)
from retriever.core.ports import Candidate, Encoded, Head, Scope, Tokenized, Vector

DIMENSIONS = 384
_WORD = re.compile(r"\w+|[^\w\s]")


def bag_of_words(text: str) -> Vector:
    """A vector that is near another where the texts share words."""
    vector = np.full(DIMENSIONS, 1e-4, dtype=np.float32)
    for word in _WORD.findall(text.lower()):
        vector[int.from_bytes(hashlib.sha256(word.encode()).digest()[:4]) % DIMENSIONS] += 1
    return vector / np.linalg.norm(vector)


class FakeEncoder:
    """Words are tokens. `failures` are raised one by one by encode_chunks before it works again."""

    def __init__(self, max_tokens: int = 34) -> None:
        self.max_tokens = max_tokens
        self.failures: list[Exception] = []
        self.encoded: list[str] = []
        self.encoder_version = "v1"

    async def version(self) -> str:
        return self.encoder_version

    async def tokenize(self, texts: Sequence[str]) -> Tokenized:
        assert texts and all(text.strip() for text in texts), "the embedder refuses empty input"
        places = [[m.span() for m in _WORD.finditer(text)] for text in texts]
        return Tokenized(
            [TokenPlaces([s for s, _ in spans], [e for _, e in spans]) for spans in places], self.max_tokens, 2
        )

    async def encode_chunks(self, texts: Sequence[str]) -> Encoded:
        if self.failures:
            raise self.failures.pop(0)
        for text in texts:
            if len(_WORD.findall(text)) > self.max_tokens - 2:
                raise PlatformError(Code.OUT_OF_RANGE, "a text is longer than the encoder reads")
        self.encoded.extend(texts)
        return Encoded([bag_of_words(text) for text in texts], self.encoder_version)

    async def encode_query(self, text: str) -> Encoded:
        return Encoded([bag_of_words(text)], self.encoder_version)


class FakeIndex:
    """ChunkStore and ChunkSearch in memory; `is_away` has every call fail as an absent server does."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[Chunk, Vector]] = {}
        self.is_away = False

    def _here(self) -> None:
        if self.is_away:
            raise PlatformError(Code.UNAVAILABLE, "the index is not available")

    def _scoped(self, scope: Scope) -> list[tuple[Chunk, Vector]]:
        self._here()
        check_tenant(scope.tenant)
        check_collection(scope.collection)
        return [
            row for row in self.rows.values() if (row[0].tenant, row[0].collection) == (scope.tenant, scope.collection)
        ]

    async def dense(self, scope: Scope, vector: Vector, limit: int) -> list[Candidate]:
        if vector.shape != (DIMENSIONS,):
            raise PlatformError(Code.INVALID_ARGUMENT, "dimensions", param="query_vector")
        found = [_candidate(chunk, float(own @ vector)) for chunk, own in self._scoped(scope)]
        return sorted(found, key=lambda c: -c.score)[:limit]

    async def keyword(self, scope: Scope, query: str, limit: int) -> list[Candidate]:
        wanted = set(_WORD.findall(query.lower()))
        scored = [(len(wanted & set(_WORD.findall(c.text.lower()))), c) for c, _ in self._scoped(scope)]
        found = [_candidate(chunk, float(score)) for score, chunk in scored if score]
        return sorted(found, key=lambda c: -c.score)[:limit]

    async def find(
        self,
        tenant: str,
        *,
        document_ids: Sequence[str] = (),
        external_ids: Sequence[str] = (),
        upload_id: str = "",
        job_id: str = "",
    ) -> list[ChunkRef]:
        self._here()
        check_tenant(tenant)
        for value in (*document_ids, *filter(None, (upload_id, job_id))):
            check_id(value)
        keys = {external_key(external_id) for external_id in external_ids if external_id}
        return [
            _ref(chunk)
            for chunk, _ in self.rows.values()
            if chunk.tenant == tenant
            and (
                chunk.document_id in document_ids
                or (chunk.external_id and external_key(chunk.external_id) in keys)
                or (upload_id and chunk.upload_id == upload_id)
                or (job_id and chunk.job_id == job_id)
            )
        ]

    async def read(self, tenant: str, keys: Sequence[str]) -> list[Chunk]:
        self._here()
        return [self.rows[key][0] for key in keys if key in self.rows and self.rows[key][0].tenant == tenant]

    async def write(self, rows: Sequence[tuple[Chunk, Vector]]) -> None:
        self._here()
        self.rows.update({chunk.key: (chunk, vector) for chunk, vector in rows})

    async def remove(self, tenant: str, keys: Sequence[str]) -> None:
        self._here()
        for key in keys:
            assert key.startswith(check_tenant(tenant) + "/")
            self.rows.pop(key, None)

    async def heads(self, tenant: str, collection: str | None) -> list[Head]:
        self._here()
        check_tenant(tenant)
        return [
            Head(chunk.key, chunk.document_id, chunk.indexed_unix_s)
            for chunk, _ in self.rows.values()
            if chunk.tenant == tenant and chunk.ordinal == 0 and collection in (None, chunk.collection)
        ]


class FakeFiles:
    """Uploads in memory."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    async def read(self, file_id: str, sha256: str) -> bytes:
        if file_id not in self.files:
            raise PlatformError(Code.NOT_FOUND, "no such file")
        data = self.files[file_id]
        if sha256 and hashlib.sha256(data).hexdigest() != sha256:
            raise PlatformError(Code.DATA_LOSS, "file: other bytes")
        return data


def make_chunk(document_id: str = "d1", ordinal: int = 0, text: str = "some text", **fields: object) -> Chunk:
    """A chunk with plain values where none are given."""
    plain = Chunk(
        tenant="acme",
        collection="default",
        document_id=document_id,
        upload_id=document_id,
        external_id="",
        title="A title",
        text=text,
        metadata_json="{}",
        ordinal=ordinal,
        num_chunks=1,
        content_sha256="0" * 64,
        revision="0123456789abcdef",
        encoder_version="v1",
        job_id="job_1",
        indexed_unix_s=1_700_000_000,
    )
    return replace(plain, **fields)  # type: ignore[arg-type]


def make_pdf(*pages: str) -> bytes:
    """A PDF with a line of text on each page; no library needed that writes PDF."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for text in pages:
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
        content = len(objects)
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R"
            b" /Resources << /Font << /F1 3 0 R >> >> >>" % content
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>".encode()
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    xref = b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, table)
    return out + xref + b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(out))


def _candidate(chunk: Chunk, score: float) -> Candidate:
    return Candidate(
        chunk.key,
        chunk.document_id,
        chunk.external_id,
        chunk.collection,
        chunk.title,
        chunk.text,
        chunk.metadata_json,
        chunk.ordinal,
        score,
    )


def _ref(chunk: Chunk) -> ChunkRef:
    return ChunkRef(
        chunk.key,
        chunk.document_id,
        chunk.upload_id,
        chunk.external_id,
        chunk.collection,
        chunk.ordinal,
        chunk.revision,
        chunk.indexed_unix_s,
        chunk.job_id,
    )
