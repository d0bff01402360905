"""Routes whose services do not do their work yet: each answers 501 in the envelope, never something made up."""

from typing import NoReturn

from fastapi import APIRouter, Request

from chassis.errors import Code, PlatformError

_NOT_YET = (
    ("GET", "/v1/batches"),
    ("POST", "/v1/batches"),
    ("GET", "/v1/batches/{batch_id}"),
    ("POST", "/v1/batches/{batch_id}/cancel"),
)


def later_router() -> APIRouter:
    """Makes the routes that are not there yet."""
    router = APIRouter()

    async def not_yet(request: Request) -> NoReturn:
        message = f"{request.method} {request.url.path} is not available yet"
        raise PlatformError(Code.UNIMPLEMENTED, message, reason="not_implemented")

    for method, path in _NOT_YET:
        router.add_api_route(path, not_yet, methods=[method], response_model=None, include_in_schema=False)
    return router
