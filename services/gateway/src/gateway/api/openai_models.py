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
        """Every model that the sender can name."""
        sender = principal_of(request)
        data = [
            _shape(model, sender.tenant) for model in await catalog.models(sender.tenant) if sender.may_ask(model.id)
        ]
        return json_response({"object": "list", "data": data})

    @router.get("/v1/models/{model_id:path}", response_model=None)
    async def get_model(request: Request, model_id: str) -> Response:
        """One model."""
        sender = principal_of(request)
        for model in await catalog.models(sender.tenant):
            if model.id == model_id and sender.may_ask(model_id):
                return json_response(_shape(model, sender.tenant))
        raise model_not_found(model_id)

    return router


def _shape(model: ServedModel, tenant: str) -> dict[str, object]:
    owner = tenant if model.is_adapter else "pressroom"  # no other tenant's adapters are told
    return {"id": model.id, "object": "model", "created": model.created_unix_s, "owned_by": owner}
