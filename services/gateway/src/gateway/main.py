"""Composition root of the gateway: the only file that knows every concrete class."""

import sys
from collections.abc import Mapping
from functools import partial

import grpc.aio

from chassis import rpc, telemetry
from chassis.app import App
from chassis.nats_bus import NatsBus
from chassis.settings import EXIT_BAD_CONFIGURATION, load_settings
from contracts.subjects import STREAMS
from gateway.api.http import Limits, make_app
from gateway.backends.generator_usage import GeneratorUsage
from gateway.backends.graph_files import Declaration, Services, assemble, check_upstream_keys, read_graphs
from gateway.backends.oidc import OidcVerifier, PublicKeySet, Trust, public_keys, reads_file, reads_url
from gateway.backends.openai_upstream import open_session
from gateway.core.graph import GraphError, Sequenced
from gateway.flow import Flow, open_flow
from gateway.settings import GatewaySettings
from gateway.state import Peers, State, open_state

# Beside the file itself an upload carries the other form fields and the boundaries.
_MULTIPART_OVERHEAD_BYTES = 64 * 1024


async def compose(app: App, settings: GatewaySettings, declarations: list[Declaration]) -> None:
    """Joins state, graphs and routes. What it calls may be away: nothing is waited for."""
    bus = NatsBus.connect(settings.nats_url, "gateway", STREAMS)
    app.on_close(bus.close)
    retriever = _open_channel(app, settings.retriever_addr)
    upstreams = open_session()
    app.on_close(upstreams.close)
    flow = open_flow(settings, retriever, partial(_open_channel, app), upstreams)
    app.set_queue_depth(flow.num_waiting)
    peers = _open_peers(app, settings, flow, retriever)
    span = telemetry.tracer().start_as_current_span
    services = Services(
        generator=flow.generator,
        embedder=flow.embedder,
        retriever=flow.retriever,
        span=span,
        upstream=flow.upstream,
        upstream_keys=settings.upstream_keys,
    )
    state = await _open_state(app, settings, bus, assemble(declarations, services), peers)
    app.mount_http(
        make_app(
            catalog=state.catalog,
            serving=state.serving,
            embedder=peers.embedder,
            keys=state.keys,
            limiter=state.limiter,
            recorder=state.recorder,
            limits=Limits(
                settings.request_timeout_s,
                settings.max_body_bytes,
                settings.max_upload_bytes + _MULTIPART_OVERHEAD_BYTES,
            ),
            idempotency=state.idempotency,
            routers=state.routers,
            in_process=state.in_process,
        )
    )


def _open_peers(app: App, settings: GatewaySettings, flow: Flow, retriever: grpc.aio.Channel) -> Peers:
    usages = GeneratorUsage(settings.generator_addr.split(","))
    app.on_close(usages.close)
    return Peers(
        generator=flow.generator,
        usages=usages,
        embedder=flow.embedder,
        admission=flow.admission,
        retriever=retriever,
        trainer=_open_channel(app, settings.trainer_addr),
        evaluator=_open_channel(app, settings.evaluator_addr),
        monitor=_open_channel(app, settings.monitor_addr),
    )


def _open_channel(app: App, address: str) -> grpc.aio.Channel:
    channel = rpc.connect(address)

    async def close() -> None:
        await channel.close()

    app.on_close(close)
    return channel


async def _open_state(
    app: App, settings: GatewaySettings, bus: NatsBus, graphs: Mapping[str, Sequenced], peers: Peers
) -> State:
    api_key, admin_key = settings.bootstrap_api_key, settings.bootstrap_admin_key
    state = await open_state(
        data_dir=settings.data_dir,
        key_pepper=settings.key_pepper.get_secret_value(),
        valkey_url=settings.valkey_url.get_secret_value(),
        bootstrap_api_key=api_key.get_secret_value() if api_key else None,
        bootstrap_admin_key=admin_key.get_secret_value() if admin_key else None,
        max_upload_bytes=settings.max_upload_bytes,
        max_tenant_upload_bytes=settings.max_tenant_upload_bytes,
        max_body_bytes=settings.max_body_bytes,
        max_batch_lines_in_flight=settings.max_batch_lines_in_flight,
        request_timeout_s=settings.request_timeout_s,
        cache_ttl_s=settings.cache_ttl_s,
        local_limit_share=settings.local_limit_share,
        bus=bus,
        graphs=graphs,
        peers=peers,
        oidc=_oidc(settings),
    )
    app.on_close(state.close)
    for add_to_server, servicer, name in (*state.servicers, *state.public_servicers):
        app.add_grpc(add_to_server, servicer, name)
    if settings.public_grpc_port is not None:
        server = app.add_grpc_port(settings.public_grpc_port)
        for add_to_server, servicer, _ in state.public_servicers:
            add_to_server(servicer, server)
    for name, run in state.tasks:
        app.spawn(name, run())
    return state


def _oidc(settings: GatewaySettings) -> OidcVerifier | None:
    if settings.oidc_issuer is None or settings.oidc_audience is None:
        return None
    if settings.oidc_jwks_file is not None:
        read = reads_file(settings.oidc_jwks_file)
    else:
        assert settings.oidc_jwks_url is not None, "the settings have checked it"
        read = reads_url(settings.oidc_jwks_url)
    trust = Trust(
        settings.oidc_issuer,
        settings.oidc_audience,
        settings.oidc_tenant_claim,
        settings.oidc_scopes_claim,
        settings.oidc_models_claim,
    )
    return OidcVerifier(trust, PublicKeySet(read))


def main() -> int:
    """Checks settings and graphs before anything is opened, then serves until told to stop."""
    settings = load_settings(GatewaySettings)
    try:
        declarations = read_graphs(settings.graphs_dir)
        check_upstream_keys(declarations, settings.upstream_keys)
    except GraphError as error:
        print(f"bad configuration: graph {error}. Mend it in GATEWAY_GRAPHS_DIR", file=sys.stderr)
        return EXIT_BAD_CONFIGURATION
    if settings.oidc_jwks_file is not None:
        try:
            public_keys(settings.oidc_jwks_file.read_bytes())
        except (OSError, ValueError) as error:
            print(f"bad configuration: GATEWAY_OIDC_JWKS_FILE: {error}. Name a JWKS file", file=sys.stderr)
            return EXIT_BAD_CONFIGURATION

    async def setup(app: App) -> None:
        await compose(app, settings, declarations)

    return App("gateway", settings).run(setup)


if __name__ == "__main__":
    sys.exit(main())
