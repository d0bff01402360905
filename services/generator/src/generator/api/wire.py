"""Maps the wire types of pressroom.generator.v1 to core and back. No decisions: core checks what is allowed."""

import json
import math
from collections.abc import Sequence

from pressroom.common.v1 import common_pb2
from pressroom.generator.v1 import generator_pb2 as pb

from generator.api.metering import StepTotals
from generator.core.adapters import AdapterSpec
from generator.core.engine import EngineStats
from generator.core.events import Delta, Done, Event, Finished, FinishReason, Started
from generator.core.grammar import Grammar
from generator.core.requests import GenerationRequest, ModelSpec, SamplingParams, StopParams
from generator.core.sequences import TokenLogprob
from generator.core.text import ChatMessage, Vocabulary
from generator.core.tool_calls import tool_grammar
from generator.core.usage import Usage

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
}


def read_request(
    message: pb.GenerateRequest,
    prompt_ids: Sequence[int],
    adapter: str,
    request_id: str,
    deadline_unix_s: float | None,
) -> GenerationRequest:
    """Returns the core request for a message whose prompt was tokenized and whose adapter is known."""
    return GenerationRequest(
        request_id=request_id,
        prompt_ids=tuple(prompt_ids),
        sampling=_read_sampling(message.sampling),
        stop=_read_stop(message.stop),
        n=message.n or 1,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        deadline_unix_s=deadline_unix_s,
        priority=message.priority,
        adapter=adapter,
        cache_salt=message.cache_salt,
        grammar=_read_grammar(message),
    )


def read_messages(chat: pb.ChatPrompt) -> list[ChatMessage]:
    """Returns the turns of a chat."""
    return [ChatMessage(m.role, m.content, m.tool_calls_json, m.tool_call_id) for m in chat.messages]


def write_event(event: Event, request: GenerationRequest, vocabulary: Vocabulary) -> pb.GenerateResponse:
    """Returns the message for an event of a request's stream."""
    match event:
        case Started():
            scores = []
            if request.prompt_logprobs is not None:
                first = TokenLogprob(request.prompt_ids[0], math.nan)
                scores = [_write_logprob(score, vocabulary) for score in (first, *event.prompt_logprobs)]
            return pb.GenerateResponse(
                started=pb.Started(
                    prompt_tokens=event.num_prompt, model_version=event.model_version, prompt_logprobs=scores
                )
            )
        case Delta():
            logprobs = [_write_logprob(logprob, vocabulary) for logprob in event.logprobs]
            return pb.GenerateResponse(
                delta=pb.Delta(index=event.index, text=event.text, token_ids=event.token_ids, logprobs=logprobs)
            )
        case Finished():
            return pb.GenerateResponse(
                finished=pb.Finished(index=event.index, reason=_REASONS[event.reason], stop_match=event.stop_match)
            )
        case Done(summary=summary):
            return pb.GenerateResponse(
                done=pb.Done(
                    usage=write_usage(Usage.of(summary)),
                    queue_s=summary.queue_s,
                    prefill_s=summary.prefill_s,
                    decode_s=summary.decode_s,
                )
            )


def write_usage(usage: Usage) -> common_pb2.Usage:
    """Returns what was used as a message."""
    return common_pb2.Usage(
        prompt_tokens=usage.num_prompt, completion_tokens=usage.num_completion, cached_tokens=usage.num_cached
    )


def write_stats(stats: EngineStats, steps: StepTotals, num_known_adapters: int) -> pb.GetStatsResponse:
    """Returns the load as a message."""
    return pb.GetStatsResponse(
        running_sequences=stats.running_sequences,
        waiting_sequences=stats.waiting_sequences,
        blocks_used=stats.blocks_used,
        blocks_total=stats.blocks_total,
        prompt_tokens_total=stats.prompt_tokens_total,
        completion_tokens_total=stats.completion_tokens_total,
        preemptions_total=stats.preemptions_total,
        prefix_query_tokens_total=stats.prefix_query_tokens_total,
        prefix_hit_tokens_total=stats.prefix_hit_tokens_total,
        steps_total=steps.num_steps,
        schedule_seconds_total=steps.schedule_s,
        forward_seconds_total=steps.forward_s,
        sample_seconds_total=steps.sample_s,
        batch_sequences_total=steps.num_sequences,
        drafted_tokens_total=steps.num_drafts,
        accepted_tokens_total=steps.num_accepted,
        loaded_adapters=stats.loaded_adapters,
        known_adapters=num_known_adapters,
        adapter_bytes=stats.adapter_bytes,
        adapter_evictions_total=stats.adapter_evictions_total,
    )


def write_model(model: ModelSpec) -> pb.ServedModel:
    """Returns a model's entry."""
    return pb.ServedModel(
        id=model.id,
        base=model.id,
        version=model.version,
        context_length=model.context_length,
        capabilities=sorted(model.capabilities),
        created_unix_s=model.created_unix_s,
    )


def write_adapter(adapter: AdapterSpec, model: ModelSpec) -> pb.ServedModel:
    """Returns an adapter's entry: it can what its base can."""
    return pb.ServedModel(
        id=adapter.id,
        base=adapter.base,
        version=adapter.version,
        context_length=model.context_length,
        capabilities=sorted(model.capabilities - {"lora"}),
        created_unix_s=adapter.created_unix_s,
    )


def _read_sampling(message: pb.SamplingParams) -> SamplingParams:
    return SamplingParams(
        temperature=message.temperature if message.HasField("temperature") else 1.0,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        top_k=message.top_k,
        min_p=message.min_p,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        logit_bias=dict(message.logit_bias),
        seed=message.seed if message.HasField("seed") else None,
    )


def _read_stop(message: pb.StopParams) -> StopParams:
    return StopParams(
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        min_tokens=message.min_tokens,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
    )


def _read_grammar(message: pb.GenerateRequest) -> Grammar | None:
    kind = message.grammar.WhichOneof("kind") if message.HasField("grammar") else None
    if kind is None:
        return None
    match kind:
        case "json_object":
            return Grammar(kind)
        case "choice":
            return Grammar(kind, json.dumps(list(message.grammar.choice.options), ensure_ascii=False))
        case "tool_calls":
            asked = message.grammar.tool_calls
            return tool_grammar(asked.tools_json, asked.is_required, asked.is_parallel, asked.json_schema)
    return Grammar(kind, getattr(message.grammar, kind))


def _write_logprob(logprob: TokenLogprob, vocabulary: Vocabulary) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=logprob.token_id,
        logprob=logprob.logprob,
        text=vocabulary.token_text(logprob.token_id),
        token_bytes=vocabulary.token_bytes(logprob.token_id),
        top=[
            pb.TopLogprob(
                token_id=token_id,
                logprob=value,
                text=vocabulary.token_text(token_id),
                token_bytes=vocabulary.token_bytes(token_id),
            )
            for token_id, value in logprob.top
        ],
    )
