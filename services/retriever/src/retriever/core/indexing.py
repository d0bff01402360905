"""Writes planned documents into the store so that it can be killed anywhere and run again.

A document's rows carry its revision, a digest of all that they depend on, and its first chunk is written last: a
document whose first chunk is there is complete. A second run leaves alone what the first one wrote, and rows of other
revisions go only when the new ones are in.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from chassis.errors import Code, PlatformError
from chassis.patience import patiently
from retriever.core.chunking import ChunkingPolicy
from retriever.core.documents import Chunk, ChunkRef, Document, chunk_key
from retriever.core.ports import ChunkStore, Encoder

_GROUP_DOCUMENTS = 64  # documents that one look at the store covers


@dataclass(frozen=True, slots=True)
class IngestPolicy:
    """How texts are cut, how many chunks go at once, and how long another service may be away before we give up."""

    chunking: ChunkingPolicy
    batch_chunks: int
    patience_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """A document with its chunks, ready to be written."""

    document: Document
    texts: list[str]
    revision: str

    def key(self, ordinal: int) -> str:
        """The store's key of one of its chunks."""
        return chunk_key(self.document.tenant, self.document.document_id, self.revision, ordinal)


class Watcher:
    """Follows one attempt; this one lets everything pass."""

    def check(self) -> None:
        """Called between batches; raises to stop."""

    async def report(self, done: int, total: int) -> None:
        """Called with the chunks that are stored, and the chunks in all."""


class Attempt:
    """One run over an upload's documents."""

    def __init__(
        self,
        store: ChunkStore,
        encoder: Encoder,
        policy: IngestPolicy,
        watcher: Watcher,
        *,
        job_id: str,
        encoder_version: str,
        indexed_unix_s: int,
    ) -> None:
        self._store = store
        self._encoder = encoder
        self._policy = policy
        self._watcher = watcher
        self._job_id = job_id
        self._encoder_version = encoder_version
        self._indexed_unix_s = indexed_unix_s
        self._done = 0
        self._total = 0

    async def run(self, tenant: str, upload_id: str, plans: Sequence[Plan]) -> None:
        """Writes what is missing and removes what an older revision or an older upload of this id left behind."""
        self._total = sum(len(plan.texts) for plan in plans)
        await self._watcher.report(0, self._total)
        remaining = iter(plans)
        while group := list(islice(remaining, _GROUP_DOCUMENTS)):
            await self._write_group(tenant, group)
        revisions = {plan.document.document_id: plan.revision for plan in plans}
        left_behind = [
            ref.key
            for ref in await self._find(tenant, upload_id=upload_id)
            if revisions.get(ref.document_id) != ref.revision
        ]
        await self._remove(tenant, left_behind)

    async def _write_group(self, tenant: str, plans: list[Plan]) -> None:
        there = await self._find(
            tenant,
            document_ids=[plan.document.document_id for plan in plans],
            external_ids=[plan.document.external_id for plan in plans if plan.document.external_id],
        )
        keys = {ref.key for ref in there}
        ours = {ref.key for ref in there if ref.job_id == self._job_id}
        missing: list[Chunk] = []
        for plan in plans:
            rows = [row for row in self._rows(plan) if row.key not in keys]
            if plan.key(0) in keys - ours:
                # Complete, by another job. Its first chunk becomes ours: if that job is undone, the document stays.
                rows = [row for row in self._rows(plan) if row.ordinal == 0]
            self._done += len(plan.texts) - len(rows)
            missing.extend(rows)
        await self._watcher.report(self._done, self._total)
        for start in range(0, len(missing), self._policy.batch_chunks):
            await self._write_batch(missing[start : start + self._policy.batch_chunks])
        await self._remove(tenant, list(_replaced(plans, there)))

    def _rows(self, plan: Plan) -> Iterator[Chunk]:
        """Yields a document's rows, the first chunk last."""
        document = plan.document
        for ordinal in (*range(1, len(plan.texts)), 0):
            yield Chunk(
                tenant=document.tenant,
                collection=document.collection,
                document_id=document.document_id,
                upload_id=document.upload_id,
                external_id=document.external_id,
                title=document.title,
                text=plan.texts[ordinal],
                metadata_json=document.metadata_json,
                ordinal=ordinal,
                num_chunks=len(plan.texts),
                content_sha256=document.content_sha256,
                revision=plan.revision,
                encoder_version=self._encoder_version,
                job_id=self._job_id,
                indexed_unix_s=self._indexed_unix_s,
            )

    async def _write_batch(self, rows: list[Chunk]) -> None:
        encoded = await patiently(
            lambda: self._encoder.encode_chunks([row.text for row in rows]),
            budget_s=self._policy.patience_s,
            before_each=self._watcher.check,
        )
        if encoded.version != self._encoder_version:
            raise PlatformError(Code.UNAVAILABLE, "the encoder was replaced during the job; it starts again")
        await patiently(
            lambda: self._store.write(list(zip(rows, encoded.vectors, strict=True))),
            budget_s=self._policy.patience_s,
        )
        self._done += len(rows)
        await self._watcher.report(self._done, self._total)

    async def _find(
        self, tenant: str, *, document_ids: Sequence[str] = (), external_ids: Sequence[str] = (), upload_id: str = ""
    ) -> list[ChunkRef]:
        return await patiently(
            lambda: self._store.find(tenant, document_ids=document_ids, external_ids=external_ids, upload_id=upload_id),
            budget_s=self._policy.patience_s,
            before_each=self._watcher.check,
        )

    async def _remove(self, tenant: str, keys: list[str]) -> None:
        if keys:
            await patiently(lambda: self._store.remove(tenant, keys), budget_s=self._policy.patience_s)


def _replaced(plans: Sequence[Plan], there: Sequence[ChunkRef]) -> Iterator[str]:
    """Yields the keys that the plans take the place of: other revisions, other documents of the same external id."""
    revisions = {plan.document.document_id: plan.revision for plan in plans}
    owners = {
        (plan.document.collection, plan.document.external_id): plan.document.document_id
        for plan in plans
        if plan.document.external_id
    }
    for ref in there:
        revision = revisions.get(ref.document_id)
        owner = owners.get((ref.collection, ref.external_id))
        if revision is not None:
            if revision != ref.revision:
                yield ref.key
        elif owner is not None and owner != ref.document_id:
            yield ref.key
