"""Joins what stands between the routes and the services that answer: the guards, the queues and the stage of admission.

Part of the composition root, as state.py is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import aiohttp
import grpc.aio

from gateway.backends.embedder import GrpcEmbedder
from gateway.backends.gateway_metrics import LaneMeter
from gateway.backends.generator import GrpcGenerator
from gateway.backends.openai_upstream import Endpoint, OpenAiUpstream
from gateway.backends.retriever import GrpcRetriever
from gateway.core.admission import Admission, Lane, QueueBounds
from gateway.core.capacity import Capacity, CapacityBounds
from gateway.core.circuit import Circuit, CircuitRules
from gateway.core.guard import Backend, Guard
from gateway.core.guarded import GuardedCompleter, GuardedEmbedder, GuardedGenerator, GuardedRetriever
from gateway.core.services import Completer, Embedder, Generator, Retriever
from gateway.core.serving import Ask
from gateway.settings import GatewaySettings

B = TypeVar("B")

# The embedder batches for itself and refuses where its own queue is full: this bounds what one gateway sends it.
_EMBEDDER_REQUESTS = CapacityBounds(start=64, least=4, most=256)
# Nobody else can answer: somebody must find out soon that it is back. And it may be several replicas behind one name:
# where one dies with all its streams, what is broken off says nothing of the others.
_ALONE = CircuitRules(row_s=0.25, least_outcomes=2**31, longest_open_s=2.0)


@dataclass(frozen=True, slots=True)
class Flow:
    """The services behind their guards, and the stage that leads requests to them."""

    generator: Generator
    embedder: Embedder
    retriever: Retriever
    admission: Admission
    upstream: Callable[[Endpoint], Completer]
    lanes: Mapping[str, Lane]  # those of upstreams come with them

    def num_waiting(self) -> int:
        """Requests that wait for their turn."""
        return sum(lane.num_waiting for lane in self.lanes.values())


def open_flow(
    settings: GatewaySettings,
    retriever: grpc.aio.Channel,
    connect: Callable[[str], grpc.aio.Channel],
    upstreams: aiohttp.ClientSession,
) -> Flow:
    """Makes the clients and what guards them. Nothing is connected yet; `connect` sees to the closing of channels."""
    bounds = QueueBounds(settings.max_waiting, settings.max_wait_s)
    running = CapacityBounds(settings.max_running, max(1, settings.max_running // 4), settings.most_running)
    generating, generators = _lane("generator", running, bounds)
    embedding, embedders = _lane("embedder", _EMBEDDER_REQUESTS, bounds)
    addresses = settings.generator_addr.split(",")
    generator: Guard[Generator] = _guard(
        "generator", {one: GrpcGenerator(connect(one)) for one in addresses}, generators, generating.capacity
    )
    embedder: Guard[Embedder] = _guard(
        "embedder",
        {settings.embedder_addr: GrpcEmbedder(connect(settings.embedder_addr))},
        embedders,
        embedding.capacity,
    )
    search: Guard[Retriever] = _guard(
        "retriever", {settings.retriever_addr: GrpcRetriever(retriever)}, LaneMeter("retriever")
    )
    lanes = {lane.backend: lane for lane in (generating, embedding)}

    def upstream(endpoint: Endpoint) -> Completer:
        # How long a vendor takes to the first token tells nothing of how much it can do at once: the limit stays.
        most = CapacityBounds(start=endpoint.max_running, least=endpoint.max_running, most=endpoint.max_running)
        lane, meter = _lane(_upstream_lane(endpoint.name), most, bounds)
        lanes[lane.backend] = lane
        return GuardedCompleter(_guard(lane.backend, {endpoint.base_url: OpenAiUpstream(upstreams, endpoint)}, meter))

    def backend_of(ask: Ask) -> str:
        if (own := _upstream_lane(ask.model)) in lanes:
            return own
        return "embedder" if ask.inputs else "generator"

    return Flow(
        GuardedGenerator(generator),
        GuardedEmbedder(embedder),
        GuardedRetriever(search),
        Admission(lanes, backend_of),
        upstream,
        lanes,
    )


def _upstream_lane(graph: str) -> str:
    return f"upstream:{graph}"


def _lane(backend: str, running: CapacityBounds, bounds: QueueBounds) -> tuple[Lane, LaneMeter]:
    meter = LaneMeter(backend)
    lane = Lane(backend, Capacity(running), bounds, meter)
    meter.watch(lane)
    return lane, meter


def _guard(service: str, targets: Mapping[str, B], meter: LaneMeter, capacity: Capacity | None = None) -> Guard[B]:
    rules = CircuitRules() if len(targets) > 1 else _ALONE
    backends = [Backend(address, target, Circuit(rules)) for address, target in targets.items()]
    for backend in backends:
        meter.watch_breaker(backend.name, backend.breaker)
    return Guard(service, backends, meter, capacity)
