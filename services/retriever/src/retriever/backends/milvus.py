"""Keeps and searches chunks in Milvus: a server, or Milvus Lite behind its server command.

All tenants share one physical collection, partitioned by tenant. What stands in a filter passed a strict pattern just
before (Lite knows no filter templates), and each row that comes back is checked for its tenant again.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pymilvus import DataType, Function, FunctionType, MilvusClient

from chassis.errors import Code, PlatformError
from retriever.backends.milvus_connection import MilvusConnection
from retriever.core.documents import Chunk, ChunkRef, check_collection, check_id, check_tenant, external_key
from retriever.core.ports import Candidate, Head, Scope, Vector

log = logging.getLogger(__name__)

COLLECTION = "chunks_v1"  # the number is the schema's version: a new schema is a new collection
DIMENSIONS = 384
_PAGE = 1_000  # Lite takes about 0.4 ms for a row, so a page stays well within a call's time
_FLUSH_EVERY = 1_000
_WORTH_FLUSHING = 64
_SETTLE_POLL_S = 2.0
_SETTLE_ALL_S = 30.0
_FLUSH_TIMEOUT_S = 60.0
_KEYS_PER_CALL = 1_024
_IDS_PER_FILTER = 64
_REF_FIELDS = ["key", "tenant", "document_id", "upload_id", "external_id", "collection", "ordinal", "revision"]
_REF_FIELDS += ["indexed_unix_s", "job_id"]
_HIT_FIELDS = ["tenant", "document_id", "external_id", "collection", "title", "text", "metadata_json", "ordinal"]
_CHUNK_FIELDS = [*_HIT_FIELDS, "upload_id", "num_chunks", "content_sha256", "revision", "encoder_version", "job_id"]
_CHUNK_FIELDS += ["indexed_unix_s"]

Row = Mapping[str, Any]


def prepare(client: MilvusClient) -> None:
    """Makes the collection where it is missing, checks it where it is there, and loads it. Blocks."""
    if not client.has_collection(COLLECTION, timeout=10):
        index = client.prepare_index_params()
        index.add_index("vector", index_type="HNSW", metric_type="COSINE", params={"M": 16, "efConstruction": 128})
        index.add_index("keywords", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25")
        client.create_collection(
            COLLECTION, schema=_schema(client), index_params=index, consistency_level="Strong", timeout=30
        )
    found = {field["name"] for field in client.describe_collection(COLLECTION, timeout=10)["fields"]}
    missing = {field.name for field in _schema(client).fields} - found
    if missing:
        raise PlatformError(Code.FAILED_PRECONDITION, f"Milvus collection {COLLECTION} has no fields {sorted(missing)}")
    client.load_collection(COLLECTION, timeout=60)


def _schema(client: MilvusClient) -> Any:
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("key", DataType.VARCHAR, max_length=512, is_primary=True)
    schema.add_field("tenant", DataType.VARCHAR, max_length=64, is_partition_key=True)
    for name, max_bytes in (
        ("collection", 64),
        ("document_id", 128),
        ("upload_id", 128),
        ("external_id", 2048),
        ("external_key", 32),
        ("title", 2048),
        ("metadata_json", 16 * 1024),
        ("content_sha256", 64),
        ("revision", 16),
        ("encoder_version", 64),
        ("job_id", 128),
    ):
        schema.add_field(name, DataType.VARCHAR, max_length=max_bytes)
    schema.add_field("text", DataType.VARCHAR, max_length=65_535, enable_analyzer=True)
    for name in ("ordinal", "num_chunks", "indexed_unix_s"):
        schema.add_field(name, DataType.INT64)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=DIMENSIONS)
    schema.add_field("keywords", DataType.SPARSE_FLOAT_VECTOR)
    schema.add_function(
        Function(
            name="bm25", function_type=FunctionType.BM25, input_field_names=["text"], output_field_names=["keywords"]
        )
    )
    return schema


class MilvusChunks:
    """ChunkStore and ChunkSearch on one connection."""

    def __init__(self, connection: MilvusConnection) -> None:
        self._connection = connection
        self._num_unflushed = 0
        self._written_at = 0.0
        self._flushed_opening = 0

    async def dense(self, scope: Scope, vector: Vector, limit: int) -> list[Candidate]:
        """Finds by cosine."""
        if vector.shape != (DIMENSIONS,):
            message = f"the query vector has {vector.size} dimensions, the index has {DIMENSIONS}"
            raise PlatformError(Code.INVALID_ARGUMENT, message, param="query_vector")
        return await self._search(scope, vector.tolist(), "vector", limit, {"ef": max(128, limit)})

    async def keyword(self, scope: Scope, query: str, limit: int) -> list[Candidate]:
        """Finds by BM25."""
        return await self._search(scope, query, "keywords", limit, {})

    async def _search(
        self, scope: Scope, data: list[float] | str, field: str, limit: int, params: dict[str, int]
    ) -> list[Candidate]:
        condition = f"{_tenant_is(scope.tenant)} and {_is('collection', check_collection(scope.collection))}"

        def call(client: MilvusClient, timeout_s: float) -> list[Candidate]:
            found = client.search(
                COLLECTION,
                data=[data],
                anns_field=field,
                limit=limit,
                filter=condition,
                output_fields=_HIT_FIELDS,
                search_params={"params": params},
                timeout=timeout_s,
            )
            return [
                # Lite gives BM25 with its sign turned round, a server does not; it is never negative by itself.
                _candidate(hit, abs(hit["distance"]) if field == "keywords" else float(hit["distance"]))
                for hit in found[0]
                if hit["entity"]["tenant"] == scope.tenant and hit["entity"]["collection"] == scope.collection
            ]

        return await self._connection.read(call)

    async def find(
        self,
        tenant: str,
        *,
        document_ids: Sequence[str] = (),
        external_ids: Sequence[str] = (),
        upload_id: str = "",
        job_id: str = "",
    ) -> list[ChunkRef]:
        """Returns the tenant's chunks that match any of what is given."""
        tests = [
            *_any_of("document_id", [check_id(document_id) for document_id in document_ids]),
            *_any_of("external_key", [external_key(external_id) for external_id in external_ids if external_id]),
            *_any_of("upload_id", [check_id(upload_id, "upload_id")] if upload_id else []),
            *_any_of("job_id", [check_id(job_id, "job_id")] if job_id else []),
        ]
        rows: dict[str, ChunkRef] = {}
        for test in tests:
            for row in await self._query(tenant, test, _REF_FIELDS):
                rows[row["key"]] = _ref(row)
        return list(rows.values())

    async def read(self, tenant: str, keys: Sequence[str]) -> list[Chunk]:
        """Returns chunks by key."""
        check_tenant(tenant)
        chunks: list[Chunk] = []
        for batch in _batches([_checked_key(tenant, key) for key in keys], _KEYS_PER_CALL):

            def call(client: MilvusClient, timeout_s: float, batch: Sequence[str] = batch) -> list[Row]:
                return list(client.get(COLLECTION, ids=list(batch), output_fields=_CHUNK_FIELDS, timeout=timeout_s))

            chunks.extend(_chunk(row) for row in await self._connection.read(call) if row["tenant"] == tenant)
        return chunks

    async def write(self, rows: Sequence[tuple[Chunk, Vector]]) -> None:
        """Inserts or replaces chunks by key."""
        records = [_record(chunk, vector) for chunk, vector in rows]
        if records:
            await self._connection.write(lambda client, s: client.upsert(COLLECTION, records, timeout=s))
            self._num_unflushed += len(records)
            self._written_at = time.monotonic()
            if self._num_unflushed >= _FLUSH_EVERY:
                await self._flush()

    async def remove(self, tenant: str, keys: Sequence[str]) -> None:
        """Removes chunks by key."""
        for batch in _batches([_checked_key(tenant, key) for key in keys], _KEYS_PER_CALL):

            def call(client: MilvusClient, timeout_s: float, batch: Sequence[str] = batch) -> None:
                client.delete(COLLECTION, ids=list(batch), timeout=timeout_s)

            await self._connection.write(call)

    async def heads(self, tenant: str, collection: str | None) -> list[Head]:
        """Returns every document's first chunk."""
        test = "ordinal == 0"
        if collection is not None:
            test += f" and {_is('collection', check_collection(collection))}"
        rows = await self._query(tenant, test, ["key", "tenant", "document_id", "indexed_unix_s"])
        return [Head(row["key"], row["document_id"], int(row["indexed_unix_s"])) for row in rows]

    async def settle(self) -> None:
        """Flushes what is left when writing pauses, until cancelled.

        Milvus Lite reads its unflushed rows one by one in Python (9,000 of them: 2.4 s a search, 0.06 s once flushed),
        and replays them when it is opened after a kill. A Milvus server flushes by itself.
        """
        while True:
            await asyncio.sleep(_SETTLE_POLL_S)
            if self._flushed_opening != self._connection.num_opened:
                self._num_unflushed = max(self._num_unflushed, _WORTH_FLUSHING)  # what the log was replayed into
            idle_s = time.monotonic() - self._written_at
            least = _WORTH_FLUSHING if idle_s < _SETTLE_ALL_S else 1
            if self._num_unflushed >= least and idle_s >= _SETTLE_POLL_S:
                try:
                    await self._flush()
                except PlatformError as error:
                    log.debug("flush was put off", extra={"error": repr(error)})

    async def _flush(self) -> None:
        opening = self._connection.num_opened
        if self._connection.is_lite:
            # Alone: Lite swaps its table of unflushed rows before it has locked readers out, and a search at that
            # moment would miss them.
            await self._connection.write_alone(
                lambda client, s: client.flush(COLLECTION, timeout=s), timeout_s=_FLUSH_TIMEOUT_S
            )
        self._num_unflushed, self._flushed_opening = 0, opening

    async def _query(self, tenant: str, test: str, fields: list[str]) -> list[Row]:
        """Returns all rows of a tenant that pass a test, however many."""
        condition = f"{_tenant_is(tenant)} and ({test})"
        rows: list[Row] = []
        after = ""
        while True:
            page = await self._page(condition, after, fields)
            rows.extend(row for row in page if row["tenant"] == tenant)
            if len(page) < _PAGE:
                return rows
            after = page[-1]["key"]

    async def _page(self, condition: str, after: str, fields: list[str]) -> list[Row]:
        """Returns the next rows in the order of their keys; `after` is a key that the store gave."""
        if after:
            tenant, _, _ = after.partition("/")
            condition += f' and key > "{_checked_key(tenant, after)}"'
        return await self._connection.read(
            lambda client, s: list(
                client.query(
                    COLLECTION,
                    filter=condition,
                    output_fields=fields,
                    limit=_PAGE,
                    timeout=s,
                    # What pymilvus's own iterator sends: rows come in the order of their keys.
                    iterator="True",
                    reduce_stop_for_best="True",
                )
            )
        )


def _tenant_is(tenant: str) -> str:
    return _is("tenant", check_tenant(tenant))


def _is(field: str, value: str) -> str:
    """Writes a comparison; the value has passed a pattern without quotes and backslashes."""
    assert '"' not in value and "\\" not in value
    return f'{field} == "{value}"'


def _any_of(field: str, values: Sequence[str]) -> Iterable[str]:
    """Writes comparisons with many checked values, in expressions of bounded length."""
    for batch in _batches(sorted(set(values)), _IDS_PER_FILTER):
        assert not any('"' in value or "\\" in value for value in batch)
        listed = ", ".join(f'"{value}"' for value in batch)
        yield f"{field} in [{listed}]"


def _checked_key(tenant: str, key: str) -> str:
    """Returns a key that is the tenant's; pymilvus puts keys between single quotes as they are."""
    owner, document_id, revision, ordinal = key.split("/")
    assert owner == check_tenant(tenant) and revision.isalnum() and ordinal.isdigit()
    check_id(document_id)
    return key


def _batches(values: Sequence[str], size: int) -> Iterable[Sequence[str]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _record(chunk: Chunk, vector: Vector) -> dict[str, Any]:
    fields = {name: getattr(chunk, name) for name in _CHUNK_FIELDS}
    return {
        **fields,
        "key": chunk.key,
        "external_key": external_key(chunk.external_id),
        "vector": vector.tolist(),
    }


def _chunk(row: Row) -> Chunk:
    return Chunk(**{name: row[name] for name in _CHUNK_FIELDS})


def _ref(row: Row) -> ChunkRef:
    return ChunkRef(**{name: row[name] for name in _REF_FIELDS if name != "tenant"})


def _candidate(hit: Any, score: float) -> Candidate:
    entity = hit["entity"]
    fields = {name: entity[name] for name in _HIT_FIELDS if name != "tenant"}
    return Candidate(key=hit["key"], score=score, **fields)
