"""The answers of OpenAI's and Anthropic's inference routes, as the OpenAPI document tells them."""

from gateway.api.openapi_schemas import (
    ANY_OBJECT,
    COUNT,
    FLAG,
    NUMBER,
    TEXT,
    TIME,
    Schema,
    array,
    nullable,
    one_of,
    record,
)

_GROUNDED = {
    "grounded": FLAG,
    "sources": array(
        record(
            {
                "document_id": TEXT,
                "external_id": nullable(TEXT),
                "chunk_id": TEXT,
                "title": TEXT,
                "score": NUMBER,
            }
        )
    ),
}
_USAGE = record(
    {
        "prompt_tokens": COUNT,
        "completion_tokens": COUNT,
        "total_tokens": COUNT,
        "prompt_tokens_details": record({"cached_tokens": COUNT}),
    }
)
_ENCODER_USAGE = record({"prompt_tokens": COUNT, "total_tokens": COUNT})
_TOOL_CALL = record(
    {"id": TEXT, "type": one_of("function"), "function": record({"name": TEXT, "arguments": TEXT})},
)
_CHOSEN = {"index": COUNT, "logprobs": nullable(ANY_OBJECT), "finish_reason": TEXT}


def _completion(kind: str, choice: dict[str, Schema], optional: dict[str, Schema]) -> Schema:
    fields = {
        "id": TEXT,
        "object": one_of(kind),
        "created": TIME,
        "model": TEXT,
        "system_fingerprint": nullable(TEXT),
        "choices": array(record(_CHOSEN | choice)),
        "usage": _USAGE,
    }
    return record(fields, optional)


_MESSAGE = record(
    {"role": one_of("assistant"), "content": nullable(TEXT), "refusal": nullable(TEXT)},
    {"tool_calls": array(_TOOL_CALL)},
)
CHAT_COMPLETION = _completion("chat.completion", {"message": _MESSAGE}, _GROUNDED)
TEXT_COMPLETION = _completion("text_completion", {"text": TEXT}, {})

EMBEDDINGS = record(
    {
        "object": one_of("list"),
        "model": TEXT,
        "data": array(
            record(
                {
                    "object": one_of("embedding"),
                    "index": COUNT,
                    "embedding": {"anyOf": [array(NUMBER), {"type": "string", "contentEncoding": "base64"}]},
                }
            )
        ),
        "usage": _ENCODER_USAGE,
    }
)

RANKING = record(
    {
        "id": TEXT,
        "model": TEXT,
        "results": array(record({"index": COUNT, "relevance_score": NUMBER}, {"document": record({"text": TEXT})})),
        "usage": _ENCODER_USAGE,
    }
)

MODEL = record({"id": TEXT, "object": one_of("model"), "created": TIME, "owned_by": TEXT})

MESSAGE = record(
    {
        "id": TEXT,
        "type": one_of("message"),
        "role": one_of("assistant"),
        "model": TEXT,
        "content": array(record({"type": one_of("text", "tool_use")})),
        "stop_reason": one_of("end_turn", "max_tokens", "stop_sequence", "tool_use"),
        "stop_sequence": nullable(TEXT),
        "usage": record(
            {
                "input_tokens": COUNT,
                "cache_creation_input_tokens": COUNT,
                "cache_read_input_tokens": COUNT,
                "output_tokens": COUNT,
            }
        ),
    },
    _GROUNDED,
)

RESPONSE = record(
    {
        "id": TEXT,
        "object": one_of("response"),
        "created_at": TIME,
        "status": one_of("completed", "incomplete"),
        "model": TEXT,
        "output": array(record({"id": TEXT, "type": one_of("message", "function_call"), "status": TEXT})),
        "incomplete_details": nullable(record({"reason": TEXT})),
        "usage": record({"input_tokens": COUNT, "output_tokens": COUNT, "total_tokens": COUNT}),
    },
    _GROUNDED,
)
