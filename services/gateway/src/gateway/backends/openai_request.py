"""What an OpenAI-compatible server is asked: a core Generation as the path and the JSON body of its request."""

from dataclasses import dataclass
from typing import Any, Literal

import orjson

from chassis.errors import Code, PlatformError
from gateway.core.services import Chat, Generation, Grammar, Message, ToolCalls

MaxTokensField = Literal["max_tokens", "max_completion_tokens"]
_MAX_INT64 = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a server understands beside the core of OpenAI's protocol."""

    has_extensions: bool = False  # vLLM's parameters, and usage in every chunk of a stream
    max_tokens_field: MaxTokensField = "max_tokens"  # of chats: some models of OpenAI's know the newer name alone


def is_echo(call: Generation) -> bool:
    """The prompt's log probabilities are wanted: an answer in one piece tells where the prompt ends."""
    return call.prompt_logprobs is not None


def request_of(call: Generation, dialect: Dialect) -> tuple[str, bytes]:
    """The path below the base URL, and the body; raises UNIMPLEMENTED for what the server does not understand."""
    is_chat = isinstance(call.prompt, Chat)
    body: dict[str, Any] = {"model": call.model}
    if isinstance(call.prompt, Chat):
        body["messages"] = [_message(message) for message in call.prompt.messages]
    else:
        body["prompt"] = call.prompt
    if not is_echo(call):
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
        if dialect.has_extensions:
            body["stream_options"]["continuous_usage_stats"] = True
    if call.n > 1:
        body["n"] = call.n
    if call.stopping.max_tokens is not None:
        body[dialect.max_tokens_field if is_chat else "max_tokens"] = call.stopping.max_tokens
    body |= _sampling(call) | _logprobs(call) | _extensions(call, dialect) | _form(call.grammar, dialect)
    return ("chat/completions" if is_chat else "completions"), orjson.dumps(body)


def _message(message: Message) -> dict[str, Any]:
    said: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls_json:
        said |= {"content": message.content or None, "tool_calls": orjson.Fragment(message.tool_calls_json)}
    if message.tool_call_id:
        said["tool_call_id"] = message.tool_call_id
    return said


def _sampling(call: Generation) -> dict[str, Any]:
    sampling = call.sampling
    fields: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty or None,
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()} or None,
        "stop": call.stopping.stop or None,
        "seed": sampling.seed,
    }
    if sampling.seed is not None and sampling.seed > _MAX_INT64:  # a client's negative one, which we keep unsigned
        fields["seed"] = sampling.seed - 2**64
    return {name: value for name, value in fields.items() if value is not None}


def _logprobs(call: Generation) -> dict[str, Any]:
    if is_echo(call):
        return {"echo": True, "logprobs": call.prompt_logprobs}
    if call.logprobs is None:
        return {}
    if not isinstance(call.prompt, Chat):
        return {"logprobs": call.logprobs}
    return {"logprobs": True, "top_logprobs": call.logprobs} if call.logprobs else {"logprobs": True}


def _extensions(call: Generation, dialect: Dialect) -> dict[str, Any]:
    fields = {
        "top_k": call.sampling.top_k,
        "min_p": call.sampling.min_p,
        "repetition_penalty": call.sampling.repetition_penalty,
        "min_tokens": call.stopping.min_tokens,
        "ignore_eos": call.stopping.ignore_eos,
    }
    asked = {name: value for name, value in fields.items() if value}
    if asked and not dialect.has_extensions:
        raise _not_understood(next(iter(asked)))
    return asked


def _form(grammar: Grammar | ToolCalls | None, dialect: Dialect) -> dict[str, Any]:
    """The form of the answer: response_format, tools, or vLLM's structured_outputs."""
    match grammar:
        case None:
            return {}
        case ToolCalls():
            fields: dict[str, Any] = {
                "tools": orjson.Fragment(grammar.tools_json),
                "tool_choice": "required" if grammar.is_required else "auto",
            }
            if not grammar.is_parallel:
                fields["parallel_tool_calls"] = False
            if grammar.json_schema:
                fields["response_format"] = _schema_format(grammar.json_schema, is_strict=False)
            return fields
        case Grammar(kind="json_object"):
            return {"response_format": {"type": "json_object"}}
        case Grammar(kind="json_schema"):
            return {"response_format": _schema_format(grammar.source, is_strict=grammar.is_strict)}
    if not dialect.has_extensions:
        raise _not_understood("grammar")
    name, source = grammar.kind, orjson.dumps(grammar.source)
    if grammar.kind == "choice":
        source = grammar.source.encode()  # a list, in JSON already
    return {"structured_outputs": {"grammar" if name == "ebnf" else name: orjson.Fragment(source)}}


def _schema_format(schema: str, *, is_strict: bool) -> dict[str, Any]:
    described = {"name": "answer", "schema": orjson.Fragment(schema), "strict": is_strict}
    return {"type": "json_schema", "json_schema": described}


def _not_understood(param: str) -> PlatformError:
    return PlatformError(Code.UNIMPLEMENTED, f"the server behind this model does not understand {param}", param=param)
