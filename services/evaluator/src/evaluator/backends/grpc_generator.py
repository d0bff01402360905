"""The generator, asked over gRPC for the log probabilities of texts: the one thing that no graph answers."""

import time
from collections.abc import Sequence

import grpc
from pressroom.common.v1 import common_pb2
from pressroom.generator.v1 import generator_pb2 as pb
from pressroom.generator.v1 import generator_pb2_grpc

from chassis import context
from chassis.errors import Code, PlatformError
from evaluator.backends.grpc_calls import PRIORITY, job_call
from evaluator.core.ports import ServedModel, TokenizedText, TokenScores


class GrpcGenerator:
    """The GeneratorService. The caller owns the channel."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout_s: float) -> None:
        self._stub = generator_pb2_grpc.GeneratorServiceStub(channel)
        self._timeout_s = timeout_s

    async def find(self, model: str) -> ServedModel | None:
        """Returns how the generator knows a model; None where it is no model of it.

        Raises NOT_FOUND for an adapter of a base that it serves, where the adapter is not loaded.
        """
        async with job_call("generator.ListModels", timeout_s=self._timeout_s) as call:
            listed = await self._stub.ListModels(pb.ListModelsRequest(), timeout=call.timeout_s, metadata=call.metadata)
        bases = {served.id: served.base or served.id for served in listed.models}
        base = model.partition(":")[0]
        if model in bases:
            return ServedModel(bases[model], "" if bases[model] == model else model)
        if base != model and base in bases:
            message = f"the adapter {model!r} is not loaded by the generator"
            raise PlatformError(Code.NOT_FOUND, message, param="model", reason="model_not_found")
        return None

    async def tokenize(self, model: ServedModel, text: str) -> TokenizedText:
        """Tokenizes a text as it is."""
        async with job_call("generator.Tokenize", timeout_s=self._timeout_s) as call:
            request = pb.TokenizeRequest(model=model.base, text=text)
            found = await self._stub.Tokenize(request, timeout=call.timeout_s, metadata=call.metadata)
        return TokenizedText(tuple(found.token_ids), found.context_length)

    async def token_scores(self, model: ServedModel, token_ids: Sequence[int]) -> TokenScores:
        """Returns how likely each token was after those before it; nothing is generated."""
        tenant = context.current().tenant
        async with job_call("generator.Generate", timeout_s=self._timeout_s) as call:
            request = pb.GenerateRequest(
                model=model.base,
                adapter=model.adapter,
                token_ids=common_pb2.TokenIds(ids=token_ids),
                stop=pb.StopParams(max_tokens=0),
                prompt_logprobs=0,
                priority=PRIORITY,
                tenant=tenant,
                cache_salt=tenant,
                deadline_unix_ms=int((time.time() + call.timeout_s) * 1000),
            )
            stream = self._stub.Generate(request, timeout=call.timeout_s, metadata=call.metadata)
            try:
                return await _scores(stream)
            finally:
                stream.cancel()


async def _scores(stream: "grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]") -> TokenScores:
    started: pb.Started | None = None
    async for message in stream:
        event = message.WhichOneof("event")
        if event == "started":
            started = message.started
        elif event == "finished" and message.finished.reason == pb.FINISH_REASON_DEADLINE:
            raise PlatformError(Code.DEADLINE_EXCEEDED, "the generator did not come to it in time")
    if started is None:
        raise PlatformError(Code.UNAVAILABLE, "the generator's answer broke off")
    scores = started.prompt_logprobs
    return TokenScores(
        logprobs=[score.logprob for score in scores],
        first_size_bytes=len(scores[0].token_bytes) if scores else 0,
        model_version=started.model_version,
    )
