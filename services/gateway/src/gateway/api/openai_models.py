"""GET /v1/models and /v1/models/{id}."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from gateway.api.identity import principal_of
from gateway.api.inference import json_response
from gateway.core.catalog import Catalog, model_not_found
from gateway.core.services import ServedModel


def models_router(catalog: Catalog) -> APIRouter:
    """The routes."""
    router = APIRouter()

    @router.get("/v1/models", response_model=None)
    async def list_models(request: Request) -> Response:
        """Every model that a request of the tenant's can name."""
        tenant = principal_of(request).tenant
        data = [_shape(model, tenant) for model in await catalog.models(tenant)]
        return json_response({"object": "list", "data": data})

    @router.get("/v1/models/{model_id:path}", response_model=None)
    async def get_model(request: Request, model_id: str) -> Response:
        """One model."""
        tenant = principal_of(request).tenant
        for model in await catalog.models(tenant):
            if model.id == model_id:
                return json_response(_shape(model, tenant))
        raise model_not_found(model_id)

    return router


def _shape(model: ServedModel, tenant: str) -> dict[str, object]:
    owner = tenant if model.is_adapter else "pressroom"  # no other tenant's adapters are told
    return {"id": model.id, "object": "model", "created": model.created_unix_s, "owned_by": owner}
