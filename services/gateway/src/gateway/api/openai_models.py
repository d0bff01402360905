"""GET /v1/models and /v1/models/{id}, in OpenAI's shape, and in Anthropic's for its clients."""

from collections.abc import Sequence
from datetime import UTC, datetime

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from gateway.api import anthropic_errors
from gateway.api.identity import principal_of
from gateway.api.inference import json_response
from gateway.api.openai_answers import MODEL
from gateway.api.openapi import documented
from gateway.api.openapi_schemas import array, one_of, record
from gateway.core.catalog import Catalog, model_not_found
from gateway.core.services import ServedModel


def models_router(catalog: Catalog) -> APIRouter:
    """The routes."""
    router = APIRouter()

    @router.get("/v1/models", response_model=None)
    @documented(record({"object": one_of("list"), "data": array(MODEL)}))
    async def list_models(request: Request) -> Response:
        """Every model that the sender can name."""
        sender = principal_of(request)
        models = [model for model in await catalog.models(sender.tenant) if sender.may_ask(model.id)]
        if anthropic_errors.is_spoken(request.scope):
            return json_response(_anthropic_page(models))
        return json_response({"object": "list", "data": [_shape(model, sender.tenant) for model in models]})

    @router.get("/v1/models/{model_id:path}", response_model=None)
    @documented(MODEL)
    async def get_model(request: Request, model_id: str) -> Response:
        """One model."""
        sender = principal_of(request)
        for model in await catalog.models(sender.tenant):
            if model.id == model_id and sender.may_ask(model_id):
                if anthropic_errors.is_spoken(request.scope):
                    return json_response(_anthropic_shape(model))
                return json_response(_shape(model, sender.tenant))
        raise model_not_found(model_id)

    return router


def _shape(model: ServedModel, tenant: str) -> dict[str, object]:
    owner = tenant if model.is_adapter else "pressroom"  # no other tenant's adapters are told
    return {"id": model.id, "object": "model", "created": model.created_unix_s, "owned_by": owner}


def _anthropic_page(models: Sequence[ServedModel]) -> dict[str, object]:
    return {
        "data": [_anthropic_shape(model) for model in models],
        "first_id": models[0].id if models else None,
        "last_id": models[-1].id if models else None,
        "has_more": False,
    }


def _anthropic_shape(model: ServedModel) -> dict[str, object]:
    created = datetime.fromtimestamp(model.created_unix_s, UTC).isoformat().replace("+00:00", "Z")
    return {"type": "model", "id": model.id, "display_name": model.id, "created_at": created}
