"""gRPC: maps the wire types of pressroom.retriever.v1 to core and back."""

from pressroom.retriever.v1 import retriever_pb2 as pb
from pressroom.retriever.v1 import retriever_pb2_grpc

from chassis import context, telemetry
from chassis.errors import Code, PlatformError
from retriever.core.filters import Condition, Operator, parse_condition
from retriever.core.library import Entry, Library
from retriever.core.ports import Candidate
from retriever.core.search import Mode, Query, Searcher, make_query

_MODES = {
    pb.SEARCH_MODE_UNSPECIFIED: Mode.DENSE,
    pb.SEARCH_MODE_DENSE: Mode.DENSE,
    pb.SEARCH_MODE_KEYWORD: Mode.KEYWORD,
    pb.SEARCH_MODE_HYBRID: Mode.HYBRID,
}
_OPERATORS = {
    pb.FILTER_OPERATOR_EQ: Operator.EQ,
    pb.FILTER_OPERATOR_NE: Operator.NE,
    pb.FILTER_OPERATOR_LT: Operator.LT,
    pb.FILTER_OPERATOR_LE: Operator.LE,
    pb.FILTER_OPERATOR_GT: Operator.GT,
    pb.FILTER_OPERATOR_GE: Operator.GE,
    pb.FILTER_OPERATOR_IN: Operator.IN,
}


class RetrieverServicer(retriever_pb2_grpc.RetrieverServiceServicer):
    """The service of the proto; every call is confined to the tenant of its metadata."""

    def __init__(self, searcher: Searcher, library: Library) -> None:
        self._searcher = searcher
        self._library = library

    async def Search(self, request: pb.SearchRequest, _: object) -> pb.SearchResponse:
        query = _query(request)
        with telemetry.tracer().start_as_current_span("retriever.search") as span:
            span.set_attribute("mode", query.mode.value)
            hits = await self._searcher.search(query)
            span.set_attribute("num_hits", len(hits))
        return pb.SearchResponse(hits=[_hit(hit) for hit in hits])

    async def GetDocument(self, request: pb.GetDocumentRequest, _: object) -> pb.GetDocumentResponse:
        entry = await self._library.get(context.current().tenant, request.document_id)
        return pb.GetDocumentResponse(document=_document(entry))

    async def ListDocuments(self, request: pb.ListDocumentsRequest, _: object) -> pb.ListDocumentsResponse:
        entries, has_more = await self._library.list(
            context.current().tenant, collection=request.collection, limit=request.limit, after=request.after
        )
        return pb.ListDocumentsResponse(documents=[_document(entry) for entry in entries], has_more=has_more)

    async def DeleteDocument(self, request: pb.DeleteDocumentRequest, _: object) -> pb.DeleteDocumentResponse:
        num_chunks = await self._library.delete(context.current().tenant, request.document_id)
        return pb.DeleteDocumentResponse(num_chunks=num_chunks)

    async def GetFeatures(self, request: pb.GetFeaturesRequest, _: object) -> pb.GetFeaturesResponse:
        raise PlatformError(Code.UNIMPLEMENTED, "no feature store is served here yet")


def _query(request: pb.SearchRequest) -> Query:
    if request.mode not in _MODES:
        raise PlatformError(Code.INVALID_ARGUMENT, f"unknown search mode {request.mode}", param="mode")
    return make_query(
        tenant=context.current().tenant,
        collection=request.collection,
        text=request.query,
        mode=_MODES[request.mode],
        top_k=request.top_k,
        conditions=[_condition(condition) for condition in request.filter],
        group_by_document=request.group_by_document,
        vector=request.query_vector,
        min_score=request.min_score if request.HasField("min_score") else None,
    )


def _condition(condition: pb.FilterCondition) -> Condition:
    operator = _OPERATORS.get(condition.operator)
    if operator is None:
        message = f"the filter on {condition.key[:128]!r} has no known operator"
        raise PlatformError(Code.INVALID_ARGUMENT, message, param="filter")
    return parse_condition(condition.key, operator, condition.values_json)


def _hit(candidate: Candidate) -> pb.Hit:
    return pb.Hit(
        document_id=candidate.document_id,
        external_id=candidate.external_id,
        chunk_id=candidate.chunk_id,
        title=candidate.title,
        text=candidate.text,
        score=candidate.score,
        collection=candidate.collection,
        metadata_json=candidate.metadata_json,
        ordinal=candidate.ordinal,
    )


def _document(entry: Entry) -> pb.Document:
    return pb.Document(
        document_id=entry.document_id,
        external_id=entry.external_id,
        title=entry.title,
        collection=entry.collection,
        num_chunks=entry.num_chunks,
        metadata_json=entry.metadata_json,
        content_sha256=entry.content_sha256,
        indexed_unix_s=entry.indexed_unix_s,
        num_documents=entry.num_documents,
    )
