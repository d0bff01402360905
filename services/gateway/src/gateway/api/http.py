"""Puts the HTTP application together: routes within, layers around them."""

from collections.abc import Iterable
from dataclasses import dataclass

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from fastapi.telemetry import TelemetryConfig
from starlette.types import ASGIApp

from gateway.api import errors, openapi
from gateway.api.anthropic_messages import messages_router
from gateway.api.direct import DirectRoutes
from gateway.api.http_health import health_router
from gateway.api.in_process import InProcess
from gateway.api.middleware import RequestFrame
from gateway.api.middleware_access import Authentication, BodyCap, Permission, RateLimit
from gateway.api.middleware_account import INFERENCE_ROUTES, Accounting
from gateway.api.middleware_idempotency import Idempotency
from gateway.api.middleware_wishes import Wishes
from gateway.api.openai_chat import chat_router
from gateway.api.openai_completions import completions_router
from gateway.api.openai_embeddings import embeddings_router
from gateway.api.openai_models import models_router
from gateway.api.openai_responses import responses_router
from gateway.api.rerank import rerank_router
from gateway.api.settlement import Recorder
from gateway.api.vllm_generate import generate_router
from gateway.core.catalog import Catalog
from gateway.core.idempotency import IdempotencyKeys
from gateway.core.ports import Keys, RequestLimiter
from gateway.core.services import Embedder
from gateway.core.serving import Serving


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request."""

    timeout_s: float
    max_body_bytes: int
    max_upload_bytes: int


def make_app(
    *,
    catalog: Catalog,
    serving: Serving,
    embedder: Embedder,
    keys: Keys,
    limiter: RequestLimiter,
    recorder: Recorder,
    limits: Limits,
    idempotency: IdempotencyKeys | None = None,
    routers: Iterable[APIRouter] = (),
    in_process: InProcess | None = None,
) -> ASGIApp:
    """Makes the application; `routers` are those of the gateway's state (documents, jobs, search, admin).

    `in_process` will ask it in the name of clients that it knows.
    """
    # FastAPI's own spans take the client's headers for their parent and would begin a second trace beside the frame's.
    no_telemetry: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
    routes = FastAPI(title="Pressroom", docs_url=None, redoc_url=None, redirect_slashes=False, telemetry=no_telemetry)
    all_routers = (
        chat_router(serving),
        completions_router(serving),
        embeddings_router(embedder, serving),
        models_router(catalog),
        messages_router(serving),
        responses_router(serving),
        generate_router(serving, catalog),
        rerank_router(embedder, serving),
        health_router(),
        *routers,
    )
    for router in all_routers:
        routes.include_router(router)
    api_routes = [route for router in all_routers for route in router.routes if isinstance(route, APIRoute)]
    errors.install(routes, api_routes)
    openapi.install(routes, api_routes)
    # From the outside in: the frame, the key, the account, the limit, the scopes, the wishes, the size, what was
    # answered before, the routes.
    direct = DirectRoutes(routes, [route for route in api_routes if route.path in INFERENCE_ROUTES])
    once = Idempotency(direct, keys=idempotency) if idempotency else direct
    capped = BodyCap(once, max_body_bytes=limits.max_body_bytes, max_upload_bytes=limits.max_upload_bytes)
    accounted = Accounting(RateLimit(Permission(Wishes(capped)), limiter=limiter), recorder=recorder)
    if in_process is not None:
        in_process.serve(accounted, limits.timeout_s)
    return RequestFrame(Authentication(accounted, keys=keys, open_app=routes), timeout_s=limits.timeout_s)
