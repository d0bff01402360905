"""Accounts for every request on the inference routes that passed authentication: one record, whatever way it ends."""

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chassis import telemetry
from gateway.api.settlement import Recorder
from gateway.core.account import Account

INFERENCE_ROUTES = frozenset(
    {
        "/generate",
        "/rerank",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/rerank",
        "/v1/responses",
    }
)
_MODEL_ROUTE = re.compile(r"/v2/models/[^/]+(?:/versions/[^/]+)?/(infer|generate|generate_stream)")


def inference_route(path: str) -> str | None:
    """The route that a request to a model is accounted to, without what clients put into it; None for other paths."""
    if path in INFERENCE_ROUTES:
        return path
    of_model = _MODEL_ROUTE.fullmatch(path)
    return f"/v2/models/{{model}}/{of_model[1]}" if of_model else None


class Accounting:
    """Opens an account for a request before anything is counted against it, and settles it at the end."""

    def __init__(self, app: ASGIApp, *, recorder: Recorder) -> None:
        self._app = app
        self._recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on; routes find the account in the scope's state."""
        route = inference_route(scope["path"])
        if scope["method"] != "POST" or route is None:
            await self._app(scope, receive, send)
            return
        state = scope["state"]
        account = Account(
            request_id=state["request_id"],
            trace_id=state["trace_id"],
            traceparent=telemetry.traceparent(),
            route=state.get("accounted_as", route),
            principal=state["principal"],
            answer_headers=state["answer_headers"],
        )
        state["account"] = account
        # What jobs ask waits behind people, and would hide their latencies.
        is_job = "accounted_as" in state
        async with self._recorder.settling(account, counts_latency=not is_job) as outcome:

            async def watched(message: Message) -> None:
                if message["type"] == "http.response.start":
                    outcome.status = message["status"]
                await send(message)

            try:
                await self._app(scope, receive, watched)
            finally:
                outcome.error = state.get("error")  # what the answer told, while it was sent
