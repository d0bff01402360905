"""Calls the endpoints of inference by themselves, past FastAPI.

What FastAPI and Starlette put around an endpoint (seven layers, each called again for every piece of a stream) takes
longer than all else before a model is asked. An endpoint of ours takes the request and gives a response, and needs none
of it. The routes stay in FastAPI as well: for the OpenAPI document, and for every other method.
"""

from collections.abc import Iterable

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from chassis.errors import PlatformError
from gateway.api import errors


class DirectRoutes:
    """Stands before the application and takes POST to these routes, whose paths have no parameters."""

    def __init__(self, app: ASGIApp, routes: Iterable[APIRoute]) -> None:
        self._app = app
        self._routes = {route.path: route for route in routes if "POST" in (route.methods or ())}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, errors of the endpoint included; what is unexpected goes on to the outermost layer."""
        route = self._routes.get(scope["path"]) if scope["method"] == "POST" else None
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = route
        try:
            response = await route.endpoint(Request(scope, receive))
            await response(scope, receive, send)
        except PlatformError as error:
            # Before the first byte: a stream tells later ones by itself.
            scope["state"]["error"] = error
            await errors.error_response(error, scope)(scope, receive, send)
