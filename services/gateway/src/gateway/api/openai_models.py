"""GET /v1/models and /v1/models/{id}."""

from fastapi import APIRouter
from starlette.responses import Response

from gateway.api.inference import json_response
from gateway.core.catalog import Catalog, model_not_found
from gateway.core.services import ServedModel


def models_router(catalog: Catalog) -> APIRouter:
    """The routes."""
    router = APIRouter()

    @router.get("/v1/models", response_model=None)
    async def list_models() -> Response:
        """Every model that a request can name."""
        return json_response({"object": "list", "data": [_shape(model) for model in await catalog.models()]})

    @router.get("/v1/models/{model_id:path}", response_model=None)
    async def get_model(model_id: str) -> Response:
        """One model."""
        for model in await catalog.models():
            if model.id == model_id:
                return json_response(_shape(model))
        raise model_not_found(model_id)

    return router


def _shape(model: ServedModel) -> dict[str, object]:
    return {"id": model.id, "object": "model", "created": model.created_unix_s, "owned_by": "pressroom"}
