"""The encoder, asked over gRPC: the embedder service."""

from collections.abc import Sequence

import grpc
import numpy as np
from pressroom.embedder.v1 import embedder_pb2, embedder_pb2_grpc

from chassis import rpc
from chassis.errors import Code, PlatformError
from retriever.core.chunking import TokenPlaces
from retriever.core.ports import Encoded, Tokenized, Vector


class GrpcEncoder:
    """One encoder of the embedder. The caller owns the channel."""

    def __init__(
        self, channel: grpc.aio.Channel, model: str, *, query_timeout_s: float, batch_timeout_s: float
    ) -> None:
        self._stub = embedder_pb2_grpc.EmbedderServiceStub(channel)
        self._model = model
        self._query_timeout_s = query_timeout_s
        self._batch_timeout_s = batch_timeout_s

    async def version(self) -> str:
        """Returns the version of the encoder that answers now."""
        async with rpc.call("embedder.ListModels", timeout_s=self._query_timeout_s) as call:
            request = embedder_pb2.ListModelsRequest()
            response = await self._stub.ListModels(request, timeout=call.timeout_s, metadata=call.metadata)
        for model in response.models:
            if model.id == self._model:
                return str(model.version)
        raise PlatformError(Code.UNAVAILABLE, f"the embedder does not serve {self._model}")

    async def tokenize(self, texts: Sequence[str]) -> Tokenized:
        """Tokenizes texts without cutting them."""
        async with rpc.call("embedder.Tokenize", timeout_s=self._batch_timeout_s) as call:
            request = embedder_pb2.TokenizeRequest(model=self._model, texts=texts)
            response = await self._stub.Tokenize(request, timeout=call.timeout_s, metadata=call.metadata)
        places = [TokenPlaces(list(text.starts), list(text.ends)) for text in response.texts]
        _check_count(len(places), len(texts))
        return Tokenized(places, response.max_tokens, response.num_special_tokens)

    async def encode_chunks(self, texts: Sequence[str]) -> Encoded:
        """Embeds chunks; raises OUT_OF_RANGE for one that is longer than the encoder reads."""
        return await self._embed(texts, truncate=False, timeout_s=self._batch_timeout_s)

    async def encode_query(self, text: str) -> Encoded:
        """Embeds a query, cut to what the encoder reads."""
        return await self._embed([text], truncate=True, timeout_s=self._query_timeout_s)

    async def _embed(self, texts: Sequence[str], *, truncate: bool, timeout_s: float) -> Encoded:
        async with rpc.call("embedder.Embed", timeout_s=timeout_s) as call:
            call.span.set_attribute("num_texts", len(texts))
            request = embedder_pb2.EmbedRequest(
                model=self._model, inputs=[embedder_pb2.EmbedInput(text=text) for text in texts], truncate=truncate
            )
            response = await self._stub.Embed(request, timeout=call.timeout_s, metadata=call.metadata)
        vectors: list[Vector] = [np.asarray(e.values, dtype=np.float32) for e in response.embeddings]
        _check_count(len(vectors), len(texts))
        return Encoded(vectors, response.model_version)


def _check_count(found: int, wanted: int) -> None:
    if found != wanted:
        raise PlatformError(Code.INTERNAL, f"the embedder answered {wanted} texts with {found} results")
