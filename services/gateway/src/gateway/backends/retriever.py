"""The retriever's search behind gRPC. The tenant travels in the metadata and comes from the request's context."""

from collections.abc import Sequence

import grpc.aio
from pressroom.retriever.v1 import retriever_pb2 as pb
from pressroom.retriever.v1 import retriever_pb2_grpc

from chassis import rpc
from chassis.context import current
from gateway.core.services import SearchQuery, Source


class GrpcRetriever:
    """Implements services.Retriever. The channel belongs to the caller."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = retriever_pb2_grpc.RetrieverServiceStub(channel)

    async def search(self, query: SearchQuery, *, timeout_s: float) -> Sequence[Source]:
        """Searches by vector."""
        assert query.tenant == current().tenant, "a search must run under its own tenant"
        request = pb.SearchRequest(
            query=query.text,
            collection=query.collection,
            mode=pb.SEARCH_MODE_DENSE,
            top_k=query.top_k,
            query_vector=query.vector,
            min_score=query.min_score,
        )
        async with rpc.call("retriever.Search", timeout_s=timeout_s) as out:
            response = await self._stub.Search(request, timeout=out.timeout_s, metadata=out.metadata)
        return [
            Source(hit.document_id, hit.external_id, hit.chunk_id, hit.title, hit.text, hit.score)
            for hit in response.hits
        ]
