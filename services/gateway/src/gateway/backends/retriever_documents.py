"""The retriever as the gateway's document index and search.

Implements core.documents.DocumentIndex and core.search.Searcher.
The tenant travels in the metadata, where every call's context puts it; so that a caller cannot forget to set it, it is
set here again from the argument.
"""

import contextlib
import dataclasses
import json
from collections.abc import Sequence

import grpc.aio
from pressroom.retriever.v1 import retriever_pb2, retriever_pb2_grpc

from chassis import context, rpc
from chassis.errors import Code, PlatformError
from gateway.core.documents import Indexed
from gateway.core.search import Condition, Hit, Mode, Operator, Question

_SEARCH_TIMEOUT_S = 15.0
_DOCUMENT_TIMEOUT_S = 10.0

_MODES = {
    Mode.DENSE: retriever_pb2.SEARCH_MODE_DENSE,
    Mode.KEYWORD: retriever_pb2.SEARCH_MODE_KEYWORD,
    Mode.HYBRID: retriever_pb2.SEARCH_MODE_HYBRID,
}
_OPERATORS = {
    Operator.EQ: retriever_pb2.FILTER_OPERATOR_EQ,
    Operator.NE: retriever_pb2.FILTER_OPERATOR_NE,
    Operator.LT: retriever_pb2.FILTER_OPERATOR_LT,
    Operator.LE: retriever_pb2.FILTER_OPERATOR_LE,
    Operator.GT: retriever_pb2.FILTER_OPERATOR_GT,
    Operator.GE: retriever_pb2.FILTER_OPERATOR_GE,
    Operator.IN: retriever_pb2.FILTER_OPERATOR_IN,
}


class RetrieverDocuments:
    """Calls the retriever over a channel that the caller opened and closes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = retriever_pb2_grpc.RetrieverServiceStub(channel)

    async def search(self, question: Question) -> Sequence[Hit]:
        """Returns hits, best first; raises PlatformError."""
        request = retriever_pb2.SearchRequest(
            query=question.query,
            collection=question.collection,
            mode=_MODES[question.mode],
            top_k=question.top_k,
            filter=[_condition(condition) for condition in question.conditions],
            group_by_document=question.group_by_document,
        )
        with _as_tenant(question.tenant):
            async with rpc.call("retriever.Search", timeout_s=_SEARCH_TIMEOUT_S) as call:
                response = await self._stub.Search(request, timeout=call.timeout_s, metadata=call.metadata)
        return [
            Hit(hit.document_id, hit.external_id, hit.chunk_id, hit.title, hit.text, hit.score) for hit in response.hits
        ]

    async def get(self, tenant: str, document_id: str) -> Indexed | None:
        """Returns what is indexed under an id."""
        request = retriever_pb2.GetDocumentRequest(document_id=document_id)
        with _as_tenant(tenant):
            try:
                async with rpc.call("retriever.GetDocument", timeout_s=_DOCUMENT_TIMEOUT_S) as call:
                    response = await self._stub.GetDocument(request, timeout=call.timeout_s, metadata=call.metadata)
            except PlatformError as error:
                if error.code is not Code.NOT_FOUND:
                    raise
                return None
        found = response.document
        metadata = json.loads(found.metadata_json) if found.metadata_json else {}
        return Indexed(
            document_id=found.document_id,
            external_id=found.external_id,
            title=found.title,
            collection=found.collection,
            num_chunks=found.num_chunks,
            metadata=metadata if isinstance(metadata, dict) else {},
            indexed_unix_s=found.indexed_unix_s,
        )

    async def delete(self, tenant: str, document_id: str) -> int | None:
        """Removes the chunks; returns how many, None where the id is unknown."""
        request = retriever_pb2.DeleteDocumentRequest(document_id=document_id)
        with _as_tenant(tenant):
            try:
                async with rpc.call("retriever.DeleteDocument", timeout_s=_DOCUMENT_TIMEOUT_S) as call:
                    response = await self._stub.DeleteDocument(request, timeout=call.timeout_s, metadata=call.metadata)
            except PlatformError as error:
                if error.code is not Code.NOT_FOUND:
                    raise
                return None
        return int(response.num_chunks)


def _as_tenant(tenant: str) -> contextlib.AbstractContextManager[None]:
    return context.use(dataclasses.replace(context.current(), tenant=tenant))


def _condition(condition: Condition) -> retriever_pb2.FilterCondition:
    return retriever_pb2.FilterCondition(
        key=condition.key,
        operator=_OPERATORS[condition.operator],
        values_json=[json.dumps(value) for value in condition.values],
    )
