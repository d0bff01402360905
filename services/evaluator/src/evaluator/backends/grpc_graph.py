"""The served models and graphs, asked over gRPC through the gateway, as a client would ask them."""

from collections.abc import Sequence

import grpc
from pressroom.gateway.v1 import gateway_pb2, gateway_pb2_grpc

from evaluator.backends.grpc_calls import PRIORITY, job_call
from evaluator.core.ports import GraphAnswer
from evaluator.core.tasks import Generation, Turn


class GrpcGraph:
    """The gateway's GraphService. The caller owns the channel."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout_s: float) -> None:
        self._stub = gateway_pb2_grpc.GraphServiceStub(channel)
        self._timeout_s = timeout_s

    async def answer(
        self, model: str, turns: Sequence[Turn], generation: Generation, *, seed: int, job_id: str
    ) -> GraphAnswer:
        """Answers one chat for the current tenant."""
        request = gateway_pb2.AnswerRequest(
            model=model,
            messages=[gateway_pb2.Turn(role=turn.role, content=turn.content) for turn in turns],
            max_tokens=generation.max_tokens,
            temperature=generation.temperature,
            seed=seed,
            stop=generation.stop,
            priority=PRIORITY,
            job_id=job_id,
        )
        async with job_call("gateway.Answer", timeout_s=self._timeout_s) as call:
            found = await self._stub.Answer(request, timeout=call.timeout_s, metadata=call.metadata)
        return GraphAnswer(found.text, found.model_version)
