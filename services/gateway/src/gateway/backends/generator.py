"""The generator behind gRPC: core types to protobuf and back."""

import json
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence

import grpc.aio
from pressroom.common.v1 import common_pb2
from pressroom.generator.v1 import generator_pb2 as pb
from pressroom.generator.v1 import generator_pb2_grpc

from chassis import rpc
from chassis.errors import Code, PlatformError
from gateway.core.services import (
    Chat,
    Delta,
    Done,
    Finished,
    Generation,
    GenerationEvent,
    Grammar,
    Prompt,
    Sampling,
    ServedModel,
    Started,
    Stopping,
    Tokenized,
    TokenLogprob,
    ToolCalls,
    TopLogprob,
    Usage,
)

_REASONS: Mapping[int, str] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "cancelled",
    pb.FINISH_REASON_DEADLINE: "deadline",
}


class GrpcGenerator:
    """Implements services.Generator. The channel belongs to the caller."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = generator_pb2_grpc.GeneratorServiceStub(channel)

    async def generate(self, call: Generation, *, timeout_s: float) -> AsyncGenerator[GenerationEvent]:
        """Streams the completion; closing or cancelling cancels the call, which stops the decoding."""
        request = _request(call)
        async with rpc.call("generator.Generate", timeout_s=timeout_s) as out:
            stream = self._stub.Generate(request, timeout=out.timeout_s, metadata=out.metadata)
            try:
                done = False
                async for response in stream:
                    event = _event(response)
                    if event is not None:
                        done = isinstance(event, Done)
                        yield event
                if not done:
                    raise PlatformError(Code.UNAVAILABLE, "generator ended the stream too early", retry_after_s=1.0)
            finally:
                stream.cancel()  # does nothing where the call has ended

    async def tokenize(self, model: str, prompt: Chat | str, *, timeout_s: float) -> Tokenized:
        """Renders and counts a prompt."""
        request = pb.TokenizeRequest(model=model)
        if isinstance(prompt, Chat):
            request.chat.CopyFrom(_chat(prompt))
        else:
            request.text = prompt
        async with rpc.call("generator.Tokenize", timeout_s=timeout_s) as out:
            response = await self._stub.Tokenize(request, timeout=out.timeout_s, metadata=out.metadata)
        return Tokenized(len(response.token_ids), response.context_length)

    async def list_models(self, *, timeout_s: float) -> Sequence[ServedModel]:
        """The models and adapters of the replica."""
        async with rpc.call("generator.ListModels", timeout_s=timeout_s) as out:
            response = await self._stub.ListModels(pb.ListModelsRequest(), timeout=out.timeout_s, metadata=out.metadata)
        return [ServedModel(model.id, model.created_unix_s, model.base, model.version) for model in response.models]


def _request(call: Generation) -> pb.GenerateRequest:
    request = pb.GenerateRequest(
        model=call.model,
        sampling=_sampling(call.sampling),
        stop=_stopping(call.stopping),
        n=call.n,
        cache_salt=call.tenant,
        tenant=call.tenant,
        logprobs=call.logprobs,
        prompt_logprobs=call.prompt_logprobs,
        adapter=call.adapter,
        priority=call.priority,
        usage_id=call.usage_id,
    )
    _set_prompt(request, call.prompt)
    if call.grammar is not None:
        request.grammar.CopyFrom(_grammar(call.grammar))
    return request


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    match prompt:
        case Chat():
            request.chat.CopyFrom(_chat(prompt))
        case str():
            request.text = prompt
        case tuple():
            request.token_ids.CopyFrom(common_pb2.TokenIds(ids=prompt))


def _chat(chat: Chat) -> pb.ChatPrompt:
    messages = [
        pb.ChatMessage(
            role=message.role,
            content=message.content,
            tool_calls_json=message.tool_calls_json,
            tool_call_id=message.tool_call_id,
        )
        for message in chat.messages
    ]
    return pb.ChatPrompt(messages=messages, tools_json=chat.tools_json)


def _sampling(sampling: Sampling) -> pb.SamplingParams:
    return pb.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        frequency_penalty=sampling.frequency_penalty or 0.0,
        presence_penalty=sampling.presence_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
    )


def _stopping(stopping: Stopping) -> pb.StopParams:
    return pb.StopParams(
        max_tokens=stopping.max_tokens,
        min_tokens=stopping.min_tokens,
        stop=stopping.stop,
        stop_token_ids=stopping.stop_token_ids,
        ignore_eos=stopping.ignore_eos,
    )


def _grammar(grammar: Grammar | ToolCalls) -> pb.Grammar:
    if isinstance(grammar, ToolCalls):
        tool_calls = pb.ToolCalls(
            tools_json=grammar.tools_json,
            is_required=grammar.is_required,
            is_parallel=grammar.is_parallel,
            json_schema=grammar.json_schema,
        )
        return pb.Grammar(tool_calls=tool_calls)
    match grammar.kind:
        case "json_schema":
            return pb.Grammar(json_schema=grammar.source)
        case "regex":
            return pb.Grammar(regex=grammar.source)
        case "choice":
            return pb.Grammar(choice=pb.Choice(options=json.loads(grammar.source)))
        case "ebnf":
            return pb.Grammar(ebnf=grammar.source)
    return pb.Grammar(json_object=True)


def _event(response: pb.GenerateResponse) -> GenerationEvent | None:
    match response.WhichOneof("event"):
        case "delta":
            delta = response.delta
            return Delta(delta.index, delta.text, len(delta.token_ids), _logprobs(delta.logprobs))
        case "started":
            started = response.started
            return Started(started.prompt_tokens, started.model_version, _logprobs(started.prompt_logprobs))
        case "finished":
            finished = response.finished
            return Finished(finished.index, _REASONS.get(finished.reason, "stop"), finished.stop_match)
        case "done":
            usage = response.done.usage
            return Done(Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens))
    return None  # an event that a newer generator sends


def _logprobs(tokens: Iterable[pb.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            token.token_id,
            token.logprob,
            token.text,
            token.token_bytes,
            tuple(TopLogprob(top.token_id, top.logprob, top.text, top.token_bytes) for top in token.top),
        )
        for token in tokens
    )
