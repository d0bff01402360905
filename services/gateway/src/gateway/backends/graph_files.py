"""Reads the declarations of graphs from YAML files and puts the graphs together.

Every mistake is a GraphError that names the file and the field, so that the process exits before a port opens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SecretStr,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from gateway.backends.openai_request import Dialect, MaxTokensField
from gateway.backends.openai_upstream import Endpoint
from gateway.core.graph import (
    Answer,
    Fallbacks,
    GraphError,
    Node,
    Sequenced,
    SpanFactory,
    Step,
    Upstream,
    check_sequence,
)
from gateway.core.graph_nodes import Encode, Generate, GenerateGrounded, Grounded, Retrieve
from gateway.core.money import Price
from gateway.core.services import Completer, Embedder, Generator, Retriever

_BLOCKS_TO_COME = ("ensemble", "router", "shadow")
_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"


@dataclass(frozen=True, slots=True)
class Services:
    """What nodes can call, and how they open a span."""

    generator: Generator
    embedder: Embedder
    retriever: Retriever
    span: SpanFactory
    upstream: Callable[[Endpoint], Completer] | None = None  # None: no graph may ask one
    upstream_keys: Mapping[str, SecretStr] = field(default_factory=dict)  # by the names that declarations use


class _Declared(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _EncodeParams(_Declared):
    model: str = Field(min_length=1)


class _RetrieveParams(_Declared):
    collection: str = Field("default", min_length=1)
    top_k: int = Field(ge=1, le=100)
    min_score: float = Field(ge=-1, le=1)


def _placeholders(template: str, known: set[str]) -> str:
    found = Template(template)
    if not found.is_valid() or set(found.get_identifiers()) - known:
        raise ValueError(f"may hold only the placeholders {', '.join(f'${name}' for name in sorted(known))}")
    return template


class _GroundedParams(_Declared):
    model: str = Field(min_length=1)
    system: str
    template: str
    source_template: str
    nothing_found: str = Field(min_length=1)
    max_tokens: int = Field(ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)

    @field_validator("template")
    @classmethod
    def _template(cls, value: str) -> str:
        if "$sources" not in value or "$question" not in value:
            raise ValueError("must hold $sources and $question")
        return _placeholders(value, {"sources", "question"})

    @field_validator("source_template")
    @classmethod
    def _source_template(cls, value: str) -> str:
        return _placeholders(value, {"number", "title", "text"})


class _GenerateParams(_Declared):
    model: str = Field(min_length=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)


class _EncodeNode(_Declared):
    id: str = Field(pattern=_NAME)
    service: Literal["embedder"]
    call: Literal["embed"]
    params: _EncodeParams

    def kind(self) -> type[Node]:
        return Encode


class _RetrieveNode(_Declared):
    id: str = Field(pattern=_NAME)
    service: Literal["retriever"]
    call: Literal["search"]
    params: _RetrieveParams

    def kind(self) -> type[Node]:
        return Retrieve


def _how_to_generate(params: object) -> str:
    plain = set(_GenerateParams.model_fields)
    return "grounded" if isinstance(params, dict) and set(params) - plain else "plain"


class _GenerateNode(_Declared):
    id: str = Field(pattern=_NAME)
    service: Literal["generator"]
    call: Literal["generate"]
    params: Annotated[
        Annotated[_GenerateParams, Tag("plain")] | Annotated[_GroundedParams, Tag("grounded")],
        Discriminator(_how_to_generate),
    ]

    def kind(self) -> type[Node]:
        return Generate if isinstance(self.params, _GenerateParams) else GenerateGrounded


class _Price(_Declared):
    """What a million tokens cost, in the currency."""

    input: float = Field(ge=0, le=1e6)
    cached_input: float | None = Field(None, ge=0, le=1e6)
    output: float = Field(ge=0, le=1e6)

    def as_data(self) -> Price:
        cached = self.input if self.cached_input is None else self.cached_input
        return Price(round(self.input * 1e6), round(cached * 1e6), round(self.output * 1e6))


class _UpstreamParams(_Declared):
    base_url: str = Field(pattern=r"^https?://[^\s/?#@]+(/[^\s?#@]*)?$")
    model: str = Field(min_length=1)
    key: str | None = Field(None, pattern=_NAME)
    timeout_s: float = Field(300.0, gt=0, le=3600)
    first_byte_timeout_s: float = Field(60.0, gt=0, le=3600)
    max_running: int = Field(1024, ge=1, le=4096)
    context_length: int = Field(131_072, ge=1, le=2**31)
    price: _Price | None = None
    max_tokens_field: MaxTokensField = "max_tokens"
    extensions: bool = False


class _UpstreamNode(_Declared):
    id: str = Field(pattern=_NAME)
    service: Literal["openai"]
    call: Literal["complete"]
    params: _UpstreamParams

    def kind(self) -> type[Node]:
        return Generate

    def endpoint(self, graph: str, keys: Mapping[str, SecretStr]) -> Endpoint:
        """The server that answers this graph; raises GraphError where its key is not there."""
        params = self.params
        if params.key is not None and params.key not in keys:
            raise GraphError(f"params.key: there is no key {params.key!r} in GATEWAY_UPSTREAM_KEYS")
        return Endpoint(
            name=graph,
            base_url=params.base_url.rstrip("/"),
            key=keys[params.key] if params.key is not None else None,
            timeout_s=params.timeout_s,
            first_byte_timeout_s=params.first_byte_timeout_s,
            max_running=params.max_running,
            dialect=Dialect(params.extensions, params.max_tokens_field),
        )


_Node = Annotated[_EncodeNode | _RetrieveNode | _GenerateNode | _UpstreamNode, Field(discriminator="service")]


class Declaration(_Declared):
    """A graph as its file declares it."""

    name: str = Field(pattern=_NAME)
    description: str = ""
    block: Literal["sequence"]
    nodes: list[_Node] = Field(min_length=1, max_length=16)
    fallbacks: list[str] = Field([], max_length=8)  # graphs that answer where this one cannot
    first_token_timeout_s: float | None = Field(None, gt=0, le=3600)  # after which they do

    @model_validator(mode="after")
    def _fallbacks_make_sense(self) -> "Declaration":
        if self.name in self.fallbacks or len(set(self.fallbacks)) != len(self.fallbacks):
            raise ValueError("fallbacks must be other graphs, each once")
        if self.first_token_timeout_s is not None and not self.fallbacks:
            raise ValueError("first_token_timeout_s needs fallbacks")
        return self


def read_graphs(folder: Path) -> list[Declaration]:
    """Reads and checks every *.yaml of a folder; raises GraphError. Blocks: call it before the event loop runs."""
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise GraphError(f"{folder}: no graph is declared here (*.yaml)")
    graphs: dict[str, Declaration] = {}
    for file in files:
        graph = _read(file)
        if graph.name in graphs:
            raise GraphError(f"{file.name}: name: the graph {graph.name!r} is declared twice")
        graphs[graph.name] = graph
    for graph in graphs.values():
        for name in graph.fallbacks:
            if name not in graphs:
                raise GraphError(f"{graph.name}: fallbacks: there is no graph {name!r}")
    return list(graphs.values())


def _read(file: Path) -> Declaration:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise GraphError(f"{file.name}: cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise GraphError(f"{file.name}: must hold one mapping with name, block and nodes")
    _refuse_blocks_to_come(file, content)
    try:
        graph = Declaration.model_validate(content)
        ids = [node.id for node in graph.nodes]
        if len(set(ids)) != len(ids):
            raise GraphError(f"the ids must differ: {', '.join(ids)}")
        check_sequence([(node.id, node.kind()) for node in graph.nodes])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise GraphError(f"{file.name}: {_field(first['loc'])}: {first['msg']}") from error
    except GraphError as error:
        raise GraphError(f"{file.name}: nodes: {error}") from error
    return graph


def _refuse_blocks_to_come(file: Path, content: Mapping[str, Any]) -> None:
    """Names the building blocks that are planned, rather than calling them unknown."""
    nodes = content.get("nodes")
    places = [("", content)]
    if isinstance(nodes, list):
        places += [(f"nodes[{i}].", node) for i, node in enumerate(nodes) if isinstance(node, dict)]
    for where, mapping in places:
        for block in _BLOCKS_TO_COME:
            if block in mapping or mapping.get("block") == block:
                field = where + (block if block in mapping else "block")
                raise GraphError(
                    f"{file.name}: {field}: the building block {block!r} is not available yet; declare a sequence"
                )


_UNION_TAGS = ("embedder", "retriever", "generator", "openai", "plain", "grounded")


def _field(loc: tuple[int | str, ...]) -> str:
    """Renders pydantic's location as nodes[0].params.top_k, without the names of union members."""
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step not in _UNION_TAGS:
            path += f".{step}" if path else step
    return path or "file"


def check_upstream_keys(declarations: Sequence[Declaration], keys: Mapping[str, SecretStr]) -> None:
    """Raises GraphError for an upstream whose key is not there; for before a port opens."""
    for graph in declarations:
        for place, node in enumerate(graph.nodes):
            if isinstance(node, _UpstreamNode):
                try:
                    node.endpoint(graph.name, keys)
                except GraphError as error:
                    raise GraphError(f"{graph.name}: nodes[{place}].{error}") from error


def assemble(declarations: Sequence[Declaration], services: Services) -> dict[str, Sequenced]:
    """Puts the graphs together, by name."""
    return {declared.name: _assembled(declared, services) for declared in declarations}


def _assembled(graph: Declaration, services: Services) -> Sequenced:
    *before, last = graph.nodes
    steps = [_step(node, services) for node in before]
    if isinstance(last, _UpstreamNode):
        if services.upstream is None:
            raise GraphError(f"{graph.name}: nothing is here to ask an upstream with")
        upstream = services.upstream(last.endpoint(graph.name, services.upstream_keys))
        price = last.params.price.as_data() if last.params.price else None
        told: Upstream | None = Upstream(last.params.context_length, price)
        answer: Answer = Generate(last.id, upstream, last.params.model)
    else:
        assert isinstance(last, _GenerateNode)  # check_sequence saw to it
        told, answer = None, _answer(last, services.generator)
    return Sequenced(
        graph.name,
        graph.description,
        steps,
        answer,
        services.span,
        last.params.model,
        Fallbacks(tuple(graph.fallbacks), graph.first_token_timeout_s),
        repr(graph.nodes),
        told,
    )


def _step(node: _Node, services: Services) -> Step:
    if isinstance(node, _EncodeNode):
        return Encode(node.id, services.embedder, node.params.model)
    assert isinstance(node, _RetrieveNode)  # check_sequence saw to it: the others stream, and so end a graph
    params = node.params
    return Retrieve(node.id, services.retriever, params.collection, params.top_k, params.min_score)


def _answer(node: _GenerateNode, generator: Generator) -> Answer:
    params = node.params
    if isinstance(params, _GenerateParams):
        return Generate(node.id, generator, params.model, params.temperature, params.top_p)
    return GenerateGrounded(node.id, generator, params.model, Grounded(**params.model_dump(exclude={"model"})))
