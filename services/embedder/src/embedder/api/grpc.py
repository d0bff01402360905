"""gRPC: maps the wire types of pressroom.embedder.v1 to core and back."""

import asyncio
from collections.abc import Sequence

from pressroom.common.v1 import common_pb2
from pressroom.embedder.v1 import embedder_pb2 as pb
from pressroom.embedder.v1 import embedder_pb2_grpc

from chassis import metrics, telemetry
from chassis.errors import Code, PlatformError
from embedder.core import inputs
from embedder.core.batcher import BatchRun
from embedder.core.service import Embedded, EmbedderCore

SERVICE = "embedder"
_FEW = 64  # vectors that are written into an answer within 3 ms


class EmbedderServicer(embedder_pb2_grpc.EmbedderServiceServicer):
    """The service of the proto over one encoder."""

    def __init__(self, core: EmbedderCore) -> None:
        self._core = core

    async def Embed(self, request: pb.EmbedRequest, context: object) -> pb.EmbedResponse:
        self._core.check_model(request.model)
        inputs.check_inputs(len(request.inputs))
        inputs.check_total(sum(len(one.text) + len(one.token_ids.ids) for one in request.inputs))
        # Tokenizing thousands of texts takes longer than the event loop may be held.
        token_lists = await asyncio.to_thread(self._token_lists, request)
        with telemetry.tracer().start_as_current_span("embedder.batch") as span:  # waiting and computing
            span.set_attribute("num_texts", len(token_lists))
            embedded = await self._core.embed(token_lists, request.dimensions)
            _record_runs({one.run for one in embedded})
        if len(embedded) <= _FEW:
            response = self._response(embedded)
        else:
            response = await asyncio.to_thread(self._response, embedded)
        metrics.TOKENS.labels(SERVICE, self._core.info.id, "prompt").inc(response.usage.prompt_tokens)
        return response

    def _response(self, embedded: Sequence[Embedded]) -> pb.EmbedResponse:
        return pb.EmbedResponse(
            embeddings=[pb.Embedding(values=e.vector.tolist(), num_tokens=e.num_tokens) for e in embedded],
            usage=common_pb2.Usage(prompt_tokens=sum(e.num_tokens for e in embedded)),
            model_version=self._core.info.version,
        )

    def _token_lists(self, request: pb.EmbedRequest) -> list[list[int]]:
        return [
            self._core.token_ids(
                one.text if one.WhichOneof("value") != "token_ids" else one.token_ids.ids, i, request.truncate
            )
            for i, one in enumerate(request.inputs)
        ]

    async def Tokenize(self, request: pb.TokenizeRequest, context: object) -> pb.TokenizeResponse:
        self._core.check_model(request.model)
        inputs.check_inputs(len(request.texts))
        inputs.check_total(sum(map(len, request.texts)))
        texts = await asyncio.to_thread(lambda: [self._tokenized(t, i) for i, t in enumerate(request.texts)])
        info = self._core.info
        return pb.TokenizeResponse(texts=texts, max_tokens=info.max_tokens, num_special_tokens=info.num_special_tokens)

    def _tokenized(self, text: str, index: int) -> pb.TokenizedText:
        tokens = self._core.tokenize(text, index)
        return pb.TokenizedText(
            token_ids=[t.id for t in tokens], starts=[t.start for t in tokens], ends=[t.end for t in tokens]
        )

    async def Rerank(self, request: pb.RerankRequest, context: object) -> pb.RerankResponse:
        raise PlatformError(Code.UNIMPLEMENTED, "no reranker is served here yet")

    async def ListModels(self, request: pb.ListModelsRequest, context: object) -> pb.ListModelsResponse:
        info = self._core.info
        return pb.ListModelsResponse(
            models=[
                pb.ServedEncoder(
                    id=info.id,
                    version=info.version,
                    dimensions=info.dimensions,
                    max_tokens=info.max_tokens,
                    created_unix_s=info.created_unix_s,
                )
            ]
        )


def _record_runs(runs: set[BatchRun]) -> None:
    """Writes a span for each run that served the request; a run serves many requests, so it is known afterwards."""
    for run in sorted(runs, key=lambda r: r.started_ns):
        span = telemetry.tracer().start_span("encoder.run", start_time=run.started_ns)
        span.set_attribute("batch_size", run.num_texts)
        span.end(run.ended_ns)
