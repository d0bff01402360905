"""GET /health, where clients of vLLM's server look before they ask; ours and orchestrators ask /healthz and /readyz."""

from fastapi import APIRouter
from starlette.responses import Response


def health_router() -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.get("/health", response_model=None, include_in_schema=False)
    async def health() -> Response:
        """Says that the process answers, as vLLM does: with no body."""
        return Response()

    return router
