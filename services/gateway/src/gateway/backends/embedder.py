"""The embedder behind gRPC: core types to protobuf and back."""

from collections.abc import Sequence

import grpc.aio
from pressroom.common.v1 import common_pb2
from pressroom.embedder.v1 import embedder_pb2 as pb
from pressroom.embedder.v1 import embedder_pb2_grpc

from chassis import rpc
from gateway.core.services import Embedded, ServedModel


class GrpcEmbedder:
    """Implements services.Embedder. The channel belongs to the caller."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = embedder_pb2_grpc.EmbedderServiceStub(channel)

    async def embed(
        self,
        model: str,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        *,
        truncate: bool,
        dimensions: int,
        timeout_s: float,
    ) -> Embedded:
        """Embeds texts or token lists; vectors are L2-normalised float32."""
        request = pb.EmbedRequest(
            model=model, inputs=[_input(one) for one in inputs], truncate=truncate, dimensions=dimensions
        )
        async with rpc.call("embedder.Embed", timeout_s=timeout_s) as out:
            response = await self._stub.Embed(request, timeout=out.timeout_s, metadata=out.metadata)
        return Embedded(tuple(one.values for one in response.embeddings), response.usage.prompt_tokens)

    async def count_tokens(self, model: str, texts: Sequence[str], *, timeout_s: float) -> Sequence[int]:
        """Counts the tokens of each text, special ones included."""
        request = pb.TokenizeRequest(model=model, texts=texts)
        async with rpc.call("embedder.Tokenize", timeout_s=timeout_s) as out:
            response = await self._stub.Tokenize(request, timeout=out.timeout_s, metadata=out.metadata)
        return [len(one.token_ids) + response.num_special_tokens for one in response.texts]

    async def list_models(self, *, timeout_s: float) -> Sequence[ServedModel]:
        """The encoders of the replica."""
        async with rpc.call("embedder.ListModels", timeout_s=timeout_s) as out:
            response = await self._stub.ListModels(pb.ListModelsRequest(), timeout=out.timeout_s, metadata=out.metadata)
        return [ServedModel(model.id, model.created_unix_s) for model in response.models]


def _input(one: str | Sequence[int]) -> pb.EmbedInput:
    if isinstance(one, str):
        return pb.EmbedInput(text=one)
    return pb.EmbedInput(token_ids=common_pb2.TokenIds(ids=one))
