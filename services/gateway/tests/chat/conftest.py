"""Fakes of what the gateway's routes call, and the application around them, in process and behind a real server."""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp

from chassis.errors import Code, PlatformError
from chassis.telemetry import tracer
from gateway.api.http import Limits, make_app
from gateway.api.settlement import Recorder
from gateway.backends.graph_files import Services, assemble, read_graphs
from gateway.core.audit import Change
from gateway.core.catalog import Catalog
from gateway.core.finetuning import TunedModel
from gateway.core.limiting import Limiting
from gateway.core.limits import LocalLimiter
from gateway.core.platform_limits import PlatformLimits
from gateway.core.policy import Limit
from gateway.core.ports import LimitState, Principal, RequestRecord
from gateway.core.repeats import Entry, Repeats
from gateway.core.services import (
    Chat,
    Delta,
    Done,
    Embedded,
    Finished,
    Generation,
    GenerationEvent,
    SearchQuery,
    ServedModel,
    Source,
    Started,
    Tokenized,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from gateway.core.serving import NoStage, Serving, Stage
from gateway.core.sizing import Sizes
from testkit import free_port

GRAPHS_DIR = Path(__file__).parents[2] / "src" / "gateway" / "graphs"
KEY = "sk-one-secret"
LIMITED_KEY = "sk-two-secret"
CONTEXT_LENGTH = 64


def words_of(prompt: Chat | str | tuple[int, ...]) -> list[str]:
    """The fake's tokenizer: a token is a word."""
    if isinstance(prompt, Chat):
        return [word for message in prompt.messages for word in message.content.split()]
    return prompt.split() if isinstance(prompt, str) else [f"t{token}" for token in prompt]


@dataclass
class FakeGenerator:
    """Answers with words w0 w1 ..., one token each."""

    calls: list[Generation] = field(default_factory=list)
    num_cancelled: int = 0
    num_finished: int = 0
    token_s: float = 0.0
    fail_after: int | None = None  # tokens after which `error` is raised
    error: Exception | None = None
    adapters: set[str] = field(default_factory=set)
    context_length: int = CONTEXT_LENGTH
    version: str = "v1"
    script: str | None = None  # says this, three characters a token, and knows grammars
    stop_match: str = ""  # what ended the script
    timeouts_s: list[float] = field(default_factory=list)
    next_errors: list[Exception] = field(default_factory=list)  # what the next calls fail with, at once

    async def generate(self, call: Generation, *, timeout_s: float) -> AsyncGenerator[GenerationEvent]:
        assert timeout_s > 0
        self.calls.append(call)
        self.timeouts_s.append(timeout_s)
        if self.next_errors:
            raise self.next_errors.pop(0)
        if call.model != "smollm2-135m-instruct":
            raise PlatformError(Code.NOT_FOUND, "unknown model", param="model", reason="model_not_found")
        if call.adapter and call.adapter not in self.adapters:
            raise PlatformError(Code.NOT_FOUND, "no such adapter", param="model", reason="model_not_found")
        if self.script is not None:
            async for event in self._say(call, self.script):
                yield event
            return
        if call.grammar is not None:
            raise PlatformError(Code.UNIMPLEMENTED, "this engine has no grammars", param="grammar")
        if self.error is not None and self.fail_after is None:
            raise self.error
        prompt = words_of(call.prompt)
        limit = call.stopping.max_tokens if call.stopping.max_tokens is not None else 8
        if len(prompt) + limit > self.context_length:
            raise PlatformError(
                Code.OUT_OF_RANGE,
                f"{len(prompt)} prompt tokens and max_tokens {limit} exceed the context of {self.context_length}",
                param="prompt",
                reason="context_length_exceeded",
            )
        complete = False
        try:
            yield Started(len(prompt), self.version, self._prompt_logprobs(call, prompt))
            for number in range(limit):
                if self.fail_after == number and self.error is not None:
                    raise self.error
                await asyncio.sleep(self.token_s)
                text = ("" if number == 0 else " ") + f"w{number}"
                for index in range(call.n):
                    yield Delta(index, text, 1, self._logprobs(call, text))
            for index in range(call.n):
                yield Finished(index, "length")
            complete = True
            yield Done(Usage(len(prompt), limit * call.n, 1))
            self.num_finished += 1
        finally:
            self.num_cancelled += not complete

    async def _say(self, call: Generation, script: str) -> AsyncGenerator[GenerationEvent]:
        if self.error is not None:
            raise self.error
        yield Started(len(words_of(call.prompt)), "v1")
        pieces = [script[at : at + 3] for at in range(0, len(script), 3)]
        most = call.stopping.max_tokens or len(pieces)
        for index in range(call.n):
            for piece in pieces[:most]:
                yield Delta(index, piece, 1, self._logprobs(call, piece))
        for index in range(call.n):
            yield Finished(index, "length") if most < len(pieces) else Finished(index, "stop", self.stop_match)
        yield Done(Usage(len(words_of(call.prompt)), min(most, len(pieces)) * call.n, 0))

    @staticmethod
    def _logprobs(call: Generation, text: str) -> tuple[TokenLogprob, ...]:
        if call.logprobs is None:
            return ()
        top = tuple(TopLogprob(i, -0.5 - i, f"{text}{i}", text.encode()) for i in range(call.logprobs))
        return (TokenLogprob(7, -0.5, text, text.encode(), top),)

    @staticmethod
    def _prompt_logprobs(call: Generation, prompt: Sequence[str]) -> tuple[TokenLogprob, ...]:
        if call.prompt_logprobs is None:
            return ()
        return tuple(TokenLogprob(i, math.nan if i == 0 else -1.0, word, b"") for i, word in enumerate(prompt))

    async def tokenize(self, model: str, prompt: Chat | str, *, timeout_s: float) -> Tokenized:
        return Tokenized(len(words_of(prompt)), self.context_length)

    async def list_models(self, *, timeout_s: float) -> Sequence[ServedModel]:
        if self.error is not None:
            raise self.error
        base = "smollm2-135m-instruct"
        tuned = [ServedModel(adapter, 1_750_000_000, base, self.version) for adapter in sorted(self.adapters)]
        return [ServedModel(base, 1_700_000_000, base, self.version), *tuned]


@dataclass
class FakeEmbedder:
    """Vectors that say how long a text is; reads at most 16 words."""

    max_tokens: int = 16
    calls: list[Sequence[object]] = field(default_factory=list)
    delay_s: float = 0.0

    async def embed(
        self,
        model: str,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        *,
        truncate: bool,
        dimensions: int,
        timeout_s: float,
    ) -> Embedded:
        self.calls.append(inputs)
        await asyncio.sleep(self.delay_s)
        if model != "all-minilm-l6-v2":
            raise PlatformError(Code.NOT_FOUND, f"unknown encoder {model}")
        counts = [len(one.split()) if isinstance(one, str) else len(one) for one in inputs]
        if max(counts) > self.max_tokens and not truncate:
            raise PlatformError(
                Code.OUT_OF_RANGE,
                f"an input has {max(counts)} tokens, the encoder reads {self.max_tokens}",
                param="input",
                reason="context_length_exceeded",
            )
        return Embedded(tuple([count / 8, 0.5, -0.25][: dimensions or 3] for count in counts), sum(counts))

    async def count_tokens(self, model: str, texts: Sequence[str], *, timeout_s: float) -> Sequence[int]:
        return [len(text.split()) for text in texts]

    async def list_models(self, *, timeout_s: float) -> Sequence[ServedModel]:
        return [ServedModel("all-minilm-l6-v2", 1_600_000_000)]


@dataclass
class FakeRetriever:
    """Gives the sources that a test puts in."""

    sources: list[Source] = field(default_factory=list)
    queries: list[SearchQuery] = field(default_factory=list)

    async def search(self, query: SearchQuery, *, timeout_s: float) -> Sequence[Source]:
        self.queries.append(query)
        return self.sources[: query.top_k]


class FakeTunedModels:
    """Which tenant owns which tuned model."""

    def __init__(self) -> None:
        self.owned: dict[str, dict[str, TunedModel]] = {}

    def own(self, tenant: str, model: TunedModel) -> None:
        self.owned.setdefault(tenant, {})[model.model_id] = model

    async def tuned(self, tenant: str, model_id: str) -> TunedModel | None:
        return self.owned.get(tenant, {}).get(model_id)

    async def tuned_of(self, tenant: str) -> Sequence[TunedModel]:
        return list(self.owned.get(tenant, {}).values())


class FakeKeys:
    """Two keys; the second may send two requests."""

    def __init__(self) -> None:
        self.principals = {
            KEY: Principal("one", "acme", allows_text=True),
            LIMITED_KEY: Principal("two", "other", requests_per_minute=2),
        }

    async def authenticate(self, key: str) -> Principal:
        try:
            return self.principals[key]
        except KeyError:
            raise PlatformError(Code.UNAUTHENTICATED, "invalid API key", reason="invalid_api_key") from None


class FakeLimiter:
    """Counts and never forgets."""

    def __init__(self) -> None:
        self._hits: dict[str, int] = {}

    async def hit(self, principal: Principal) -> LimitState:
        limit = principal.requests_per_minute
        if limit is None:
            return LimitState(True, None, 0, 0.0)
        count = self._hits[principal.key_id] = self._hits.get(principal.key_id, 0) + 1
        return LimitState(count <= limit, limit, max(0, limit - count), 61.5)


class FakeLimitStore:
    """The platform's limits."""

    def __init__(self) -> None:
        self.kept: tuple[Limit, ...] = ()

    async def limits(self) -> tuple[Limit, ...]:
        return self.kept

    async def set_limits(self, limits: Sequence[Limit], change: Change) -> None:
        self.kept = tuple(limits)


class FakeLedger:
    """Keeps records in a list."""

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []
        self.error: Exception | None = None

    async def record(self, record: RequestRecord) -> None:
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        self.records.append(record)


class FakeCache:
    """Keeps answers in a dictionary."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    async def get(self, key: str) -> Entry | None:
        return self.entries.get(key)

    async def put(self, key: str, entry: Entry) -> None:
        self.entries[key] = entry


@dataclass
class World:
    """The application and everything that it was given."""

    app: ASGIApp
    generator: FakeGenerator
    embedder: FakeEmbedder
    retriever: FakeRetriever
    ledger: FakeLedger
    tuned: FakeTunedModels
    catalog: Catalog
    keys: FakeKeys
    limiter: LocalLimiter
    platform_limits: PlatformLimits

    def client(self, key: str | None = KEY) -> httpx.AsyncClient:
        """An HTTP client that talks to the application in this process."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(app=self.app)
        return httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers, trust_env=False)


@pytest.fixture
def key() -> str:
    return KEY


@pytest.fixture
def limited_key() -> str:
    return LIMITED_KEY


@pytest.fixture
def cache() -> FakeCache:
    return FakeCache()


@pytest.fixture
def keys() -> FakeKeys:
    return FakeKeys()


@pytest.fixture
def graphs_dir() -> Path:
    """Of the graphs that the application serves; a test module may give its own."""
    return GRAPHS_DIR


@pytest.fixture
def admission() -> Stage:
    """The last stage of the application; a test module may give its own."""
    return NoStage()


@pytest.fixture
def world(cache: FakeCache, keys: FakeKeys, graphs_dir: Path, admission: Stage) -> World:
    generator, embedder, retriever, ledger = FakeGenerator(), FakeEmbedder(), FakeRetriever(), FakeLedger()
    tuned = FakeTunedModels()
    services = Services(generator, embedder, retriever, tracer().start_as_current_span)
    graphs = assemble(read_graphs(graphs_dir), services)
    catalog = Catalog(graphs, generator, embedder, tuned)
    limiter, platform_limits = LocalLimiter(), PlatformLimits(FakeLimitStore())
    limiting = Limiting(limiter, Sizes(graphs, generator, embedder), platform_limits, lambda meter: None)
    app = make_app(
        catalog=catalog,
        serving=Serving(catalog, stages=(limiting,), admission=admission, repeats=Repeats(catalog, cache)),
        embedder=embedder,
        keys=keys,
        limiter=FakeLimiter(),
        recorder=Recorder(ledger),
        limits=Limits(timeout_s=30.0, max_body_bytes=64 * 1024, max_upload_bytes=1024 * 1024),
    )
    return World(app, generator, embedder, retriever, ledger, tuned, catalog, keys, limiter, platform_limits)


@pytest.fixture
async def base_url(world: World) -> AsyncIterator[str]:
    """The application behind a real uvicorn."""
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(world.app, host="127.0.0.1", port=port, lifespan="off", log_config=None, access_log=False)
    )
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn offers a flag only
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{port}/v1"
    server.should_exit = True
    await task
