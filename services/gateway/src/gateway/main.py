"""Composition root of the gateway: the only file that knows every concrete class."""

import sys

import grpc.aio

from chassis import rpc, telemetry
from chassis.app import App
from chassis.nats_bus import NatsBus
from chassis.settings import EXIT_BAD_CONFIGURATION, load_settings
from contracts.subjects import STREAMS
from gateway.api.http import Limits, make_app
from gateway.api.middleware_account import Recorder
from gateway.backends.embedder import GrpcEmbedder
from gateway.backends.generator import GrpcGenerator
from gateway.backends.graph_files import Declaration, Services, assemble, read_graphs
from gateway.backends.retriever import GrpcRetriever
from gateway.core.catalog import Catalog
from gateway.core.graph import GraphError
from gateway.settings import GatewaySettings
from gateway.state import State, open_state

# Beside the file itself an upload carries the other form fields and the boundaries.
_MULTIPART_OVERHEAD_BYTES = 64 * 1024


async def compose(app: App, settings: GatewaySettings, declarations: list[Declaration]) -> None:
    """Joins state, graphs and routes. What it calls may be away: nothing is waited for."""
    embedder_channel, retriever_channel, generator_channel, monitor_channel = (
        _open_channel(app, address)
        for address in (
            settings.embedder_addr,
            settings.retriever_addr,
            settings.generator_addr,
            settings.monitor_addr,
        )
    )
    bus = NatsBus.connect(settings.nats_url, "gateway", STREAMS)
    app.on_close(bus.close)
    state = await _open_state(app, settings, bus, retriever_channel, monitor_channel)
    recorder = Recorder(state.ledger)
    app.on_close(recorder.close)

    generator, embedder = GrpcGenerator(generator_channel), GrpcEmbedder(embedder_channel)
    services = Services(generator, embedder, GrpcRetriever(retriever_channel), telemetry.tracer().start_as_current_span)
    app.mount_http(
        make_app(
            catalog=Catalog(assemble(declarations, services), generator, embedder),
            embedder=embedder,
            keys=state.keys,
            limiter=state.limiter,
            recorder=recorder,
            limits=Limits(
                settings.request_timeout_s,
                settings.max_body_bytes,
                settings.max_upload_bytes + _MULTIPART_OVERHEAD_BYTES,
            ),
            routers=state.routers,
        )
    )


def _open_channel(app: App, address: str) -> grpc.aio.Channel:
    channel = rpc.connect(address)

    async def close() -> None:
        await channel.close()

    app.on_close(close)
    return channel


async def _open_state(
    app: App, settings: GatewaySettings, bus: NatsBus, retriever: grpc.aio.Channel, monitor: grpc.aio.Channel
) -> State:
    api_key, admin_key = settings.bootstrap_api_key, settings.bootstrap_admin_key
    state = await open_state(
        data_dir=settings.data_dir,
        key_pepper=settings.key_pepper.get_secret_value(),
        valkey_url=settings.valkey_url.get_secret_value(),
        bootstrap_api_key=api_key.get_secret_value() if api_key else None,
        bootstrap_admin_key=admin_key.get_secret_value() if admin_key else None,
        max_upload_bytes=settings.max_upload_bytes,
        bus=bus,
        retriever=retriever,
        monitor=monitor,
    )
    app.on_close(state.close)
    app.add_grpc(state.add_files_servicer, state.files_servicer, state.files_service_name)
    for name, run in state.tasks:
        app.spawn(name, run())
    return state


def main() -> int:
    """Checks settings and graphs before anything is opened, then serves until told to stop."""
    settings = load_settings(GatewaySettings)
    try:
        declarations = read_graphs(settings.graphs_dir)
    except GraphError as error:
        print(f"bad configuration: graph {error}. Mend it in GATEWAY_GRAPHS_DIR", file=sys.stderr)
        return EXIT_BAD_CONFIGURATION

    async def setup(app: App) -> None:
        await compose(app, settings, declarations)

    return App("gateway", settings).run(setup)


if __name__ == "__main__":
    sys.exit(main())
