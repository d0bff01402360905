"""GET /health, where clients of vLLM's server look before they ask; ours and orchestrators ask /healthz and /readyz."""

from fastapi import APIRouter
from starlette.responses import Response

from gateway.api.openapi import documented


def health_router() -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.get("/health", response_model=None)
    @documented(media_type="")
    async def health() -> Response:
        """Says that the process answers, as vLLM does: with no body."""
        return Response()

    return router
