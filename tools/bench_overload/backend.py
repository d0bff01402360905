"""A generator of a fixed capacity, without a model: so many at once, so long a token, the others wait in line."""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc.aio
from pressroom.common.v1 import common_pb2
from pressroom.generator.v1 import generator_pb2 as pb
from pressroom.generator.v1 import generator_pb2_grpc

from chassis import rpc

MODEL = "smollm2-135m-instruct"
_CONTEXT = 8192
_PIECE = 20  # tokens in one message: the bench is about waiting and not about messages


@dataclass(frozen=True)
class Capacity:
    """Requests that run at once, and what a token of prompt and of completion takes."""

    slots: int = 4
    prompt_token_s: float = 0.0005
    token_s: float = 0.005

    def service_s(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What a request takes once it runs."""
        return prompt_tokens * self.prompt_token_s + completion_tokens * self.token_s

    def per_s(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Such requests that are done in a second."""
        return self.slots / self.service_s(prompt_tokens, completion_tokens)


class FixedGenerator(generator_pb2_grpc.GeneratorServiceServicer):
    """A token is four characters of the prompt; a completion has as many as it may have."""

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._slots = asyncio.Semaphore(capacity.slots)  # first come, first served
        self._chance = random.Random(1)

    async def Generate(
        self, request: pb.GenerateRequest, _: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Waits in line, then reads the prompt and speaks."""
        num_prompt, left = len(request.text) // 4, request.stop.max_tokens
        speed = self._chance.uniform(0.7, 1.3)  # equal requests would go in lockstep
        async with self._slots:
            yield pb.GenerateResponse(started=pb.Started(prompt_tokens=num_prompt, model_version="fixed"))
            await asyncio.sleep(speed * num_prompt * self._capacity.prompt_token_s)
            while left:
                piece = min(left, _PIECE)
                await asyncio.sleep(speed * piece * self._capacity.token_s)
                yield pb.GenerateResponse(delta=pb.Delta(text="word " * piece, token_ids=[1] * piece))
                left -= piece
        yield pb.GenerateResponse(finished=pb.Finished(reason=pb.FINISH_REASON_LENGTH))
        usage = common_pb2.Usage(prompt_tokens=num_prompt, completion_tokens=request.stop.max_tokens)
        yield pb.GenerateResponse(done=pb.Done(usage=usage))

    async def Tokenize(self, request: pb.TokenizeRequest, _: grpc.aio.ServicerContext) -> pb.TokenizeResponse:
        """Counts."""
        return pb.TokenizeResponse(token_ids=[1] * (len(request.text) // 4), context_length=_CONTEXT)

    async def ListModels(self, _: pb.ListModelsRequest, __: grpc.aio.ServicerContext) -> pb.ListModelsResponse:
        """The one model."""
        return pb.ListModelsResponse(models=[pb.ServedModel(id=MODEL, base=MODEL)])

    async def CloseUsage(self, _: pb.CloseUsageRequest, __: grpc.aio.ServicerContext) -> pb.CloseUsageResponse:
        """Nothing is kept here: what was received counts."""
        return pb.CloseUsageResponse(instance="fixed", num_calls=0)


async def serve(capacity: Capacity) -> tuple[grpc.aio.Server, str]:
    """Starts it; returns the server, which the caller stops, and its address."""
    server = rpc.make_server("generator")
    generator_pb2_grpc.add_GeneratorServiceServicer_to_server(FixedGenerator(capacity), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"
