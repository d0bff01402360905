"""The models behind the Open Inference Protocol: requests for tensors become what the OpenAI routes ask.

A graph takes the text input `text_input` and gives `text_output`; an encoder takes `text` and gives `embedding`. Their
parameters are those of /v1/completions and /v1/embeddings, under the same rules.
"""

from array import array
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from chassis.errors import Code, PlatformError
from gateway.api.json_body import parse_json, validate
from gateway.api.openai_completions import CompletionBody
from gateway.api.openai_embeddings import EmbeddingsBody
from gateway.core.account import Account
from gateway.core.catalog import Catalog, model_not_found
from gateway.core.graph import Deadline, Graph
from gateway.core.open_inference import (
    InferRequest,
    InferResponse,
    ModelKind,
    Parameter,
    Tensor,
    TensorKind,
    check_outputs,
    check_version,
    chosen,
)
from gateway.core.ports import Principal
from gateway.core.services import Delta, Done, Embedder, Finished, Usage
from gateway.core.serving import Ask, Serving

SERVER_NAME, SERVER_VERSION = "pressroom", "0.1.0"
EXTENSIONS = ("binary_tensor_data", "generate")

_PROMPTS = ("text_input", "prompt")
_TEXTS = ("text", "text_input", "input")
_TEXT_OUTPUTS = ("text_output", "finish_reason")
_EMBEDDING_OUTPUTS = ("embedding",)
# What Triton's clients and its vLLM backend send beside the parameters of the model.
_SAMPLING_PARAMETERS = "sampling_parameters"  # JSON, as Triton's vLLM backend takes it
_NOT_FOR_THE_MODEL = ("model", "prompt", "stream", "stream_options", "logprobs", "input", "encoding_format")


@dataclass(frozen=True, slots=True)
class Sender:
    """Who asks, in which account, until when."""

    principal: Principal
    account: Account
    deadline: Deadline


@dataclass(slots=True)
class _Texts:
    """What the completions of one request have come to."""

    texts: list[list[str]]
    reasons: list[str]
    usage: Usage = field(default_factory=Usage)

    def outputs(self) -> tuple[Tensor, ...]:
        shape = (len(self.texts),)
        return (
            Tensor("text_output", "BYTES", shape, ["".join(text).encode() for text in self.texts]),
            Tensor("finish_reason", "BYTES", shape, [reason.encode() for reason in self.reasons]),
        )


class OpenInference:
    """Tells of models and asks them."""

    def __init__(self, serving: Serving, catalog: Catalog, embedder: Embedder) -> None:
        self._serving = serving
        self._catalog = catalog
        self._embedder = embedder

    async def describe(self, principal: Principal, name: str, version: str) -> ModelKind:
        """What a model takes and gives; raises NOT_FOUND."""
        check_version(version)
        if await self._graph(principal, name) is not None:
            return _graph_kind(name)
        if not any(model.id == name for model in await self._catalog.models(principal.tenant)):
            raise model_not_found(name)
        return _encoder_kind(name)

    async def check_generates(self, principal: Principal, name: str) -> None:
        """Raises NOT_FOUND for a model that gives no text, or that is none at all."""
        if (await self.describe(principal, name, "")).outputs[0].datatype != "BYTES":
            message = f"the model {name[:200]!r} does not generate text; ask it with infer"
            raise PlatformError(Code.NOT_FOUND, message, param="model")

    async def infer(self, sender: Sender, request: InferRequest) -> InferResponse:
        """Asks a model; raises PlatformError as the OpenAI routes do."""
        check_version(request.version)
        graph = await self._graph(sender.principal, request.model)
        if graph is None:
            return await self._embed(sender, request)
        ask, texts = _ask(sender, request, graph)
        async with aclosing(self._serving.run(ask, graph)) as events:
            async for event in events:
                _take(texts, event)
        return InferResponse(graph.name, request.id, chosen(request, texts.outputs()), _used(texts.usage))

    async def stream(self, sender: Sender, request: InferRequest) -> AsyncGenerator[InferResponse]:
        """Asks a graph for its text piece by piece; an encoder has one piece. Close it where it is iterated."""
        check_version(request.version)
        graph = await self._graph(sender.principal, request.model)
        if graph is None:
            yield await self._embed(sender, request)
            return
        ask, _ = _ask(sender, request, graph)
        sender.account.stream = True
        async with aclosing(self._serving.run(ask, graph)) as events:
            async for event in events:
                match event:
                    case Delta() if event.text:
                        yield _piece(graph, request, event.index, event.text)
                    case Finished():
                        yield _piece(graph, request, event.index, "", event.reason)

    async def _graph(self, principal: Principal, name: str) -> Graph | None:
        try:
            return await self._serving.graph(principal, name)
        except PlatformError as error:
            if error.code is not Code.NOT_FOUND:
                raise
            return None

    async def _embed(self, sender: Sender, request: InferRequest) -> InferResponse:
        texts, parameters = _read(request, _TEXTS)
        check_outputs(request, _EMBEDDING_OUTPUTS)
        body = validate(parameters | {"model": request.model, "input": texts}, EmbeddingsBody)
        ask = Ask(sender.principal, sender.account, sender.deadline, request.model, inputs=tuple(texts))
        async with self._serving.hold(ask):
            try:
                embedded = await self._embedder.embed(
                    request.model,
                    texts,
                    truncate=False,
                    dimensions=body.dimensions or 0,
                    timeout_s=sender.deadline.remaining_s(),
                )
            except PlatformError as error:
                if error.code is Code.NOT_FOUND:
                    raise model_not_found(request.model) from None
                raise
            sender.account.model = request.model
            sender.account.done(Usage(prompt_tokens=embedded.num_tokens))
            sender.account.finish_reason = "stop"
        shape = (len(embedded.vectors), len(embedded.vectors[0]))
        vectors = Tensor("embedding", "FP32", shape, array("f", chain.from_iterable(embedded.vectors)))
        return InferResponse(request.model, request.id, (vectors,), {"prompt_tokens": embedded.num_tokens})


def _ask(sender: Sender, request: InferRequest, graph: Graph) -> tuple[Ask, _Texts]:
    """What the graph is asked, and where its answers go."""
    check_outputs(request, _TEXT_OUTPUTS)
    prompts, parameters = _read(request, _PROMPTS)
    body = validate(parameters | {"model": request.model, "prompt": prompts}, CompletionBody)
    wanted = tuple(body.requests(sender.principal.tenant))
    sender.account.model = graph.name
    sender.account.prompt_text = "\n".join(prompts)
    num_choices = len(wanted) * wanted[0].n
    texts = _Texts([[] for _ in range(num_choices)], [""] * num_choices)
    if body.echo:
        for choice, text in enumerate(texts.texts):
            text.append(prompts[choice // wanted[0].n])
    return Ask(sender.principal, sender.account, sender.deadline, graph.name, requests=wanted), texts


def _piece(graph: Graph, request: InferRequest, index: int, text: str, reason: str = "") -> InferResponse:
    outputs = (
        Tensor("text_output", "BYTES", (1,), [text.encode()]),
        Tensor("finish_reason", "BYTES", (1,), [reason.encode()]),
    )
    return InferResponse(graph.name, request.id, chosen(request, outputs), {"index": index})


def _take(texts: _Texts, event: object) -> None:
    match event:
        case Delta():
            texts.texts[event.index].append(event.text)
        case Finished():
            texts.reasons[event.index] = event.reason
        case Done():
            texts.usage = event.usage


def _used(usage: Usage) -> Mapping[str, Parameter]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cached_tokens": usage.cached_tokens,
    }


def _read(request: InferRequest, names: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The texts of a request and the parameters of its model, which may come as tensors of one element too."""
    texts: list[str] | None = None
    parameters: dict[str, Any] = dict(request.parameters)
    for tensor in request.inputs:
        tensor.check()
        if tensor.name in names:
            if texts is not None:
                raise _refused(tensor.name, f"there are two of: {', '.join(names)}")
            texts = _texts(tensor)
        elif len(tensor.values) == 1:
            parameters[tensor.name] = _texts(tensor)[0] if tensor.datatype == "BYTES" else tensor.values[0]
        else:
            raise _refused(tensor.name, f"the model has no such input; there is: {names[0]}")
    if texts is None:
        raise _refused(names[0], "the input is missing")
    as_json = parameters.pop(_SAMPLING_PARAMETERS, None)
    if isinstance(as_json, str):
        parameters |= parse_json(as_json.encode())
    return texts, {name: value for name, value in parameters.items() if name not in _NOT_FOR_THE_MODEL}


def _texts(tensor: Tensor) -> list[str]:
    if tensor.datatype != "BYTES":
        raise _refused(tensor.name, f"the datatype is BYTES, not {tensor.datatype}")
    try:
        return [value.decode() for value in tensor.values if isinstance(value, bytes)]
    except UnicodeDecodeError as error:
        raise _refused(tensor.name, f"an element is no UTF-8: {error.reason}") from None


def _refused(name: str, why: str) -> PlatformError:
    return PlatformError(
        Code.INVALID_ARGUMENT, f"the input {name[:100]!r}: {why}", param=name[:100], reason="invalid_value"
    )


def _graph_kind(name: str) -> ModelKind:
    return ModelKind(
        name,
        "pressroom_generator",
        (TensorKind("text_input", "BYTES", (-1,)),),
        tuple(TensorKind(output, "BYTES", (-1,)) for output in _TEXT_OUTPUTS),
    )


def _encoder_kind(name: str) -> ModelKind:
    return ModelKind(
        name,
        "pressroom_embedder",
        (TensorKind("text", "BYTES", (-1,)),),
        (TensorKind("embedding", "FP32", (-1, -1)),),
    )
