"""Accounts for every request on the inference routes that passed authentication: one record, whatever way it ends."""

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


class Accounting:
    """Opens an account for a request before anything is counted against it, and settles it at the end."""

    def __init__(self, app: ASGIApp, *, recorder: Recorder) -> None:
        self._app = app
        self._recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on; routes find the account in the scope's state."""
        if scope["method"] != "POST" or scope["path"] not in INFERENCE_ROUTES:
            await self._app(scope, receive, send)
            return
        state = scope["state"]
        account = Account(
            request_id=state["request_id"],
            trace_id=state["trace_id"],
            traceparent=telemetry.traceparent(),
            route=scope["path"],
            principal=state["principal"],
            answer_headers=state["answer_headers"],
        )
        state["account"] = account
        async with self._recorder.settling(account) as outcome:

            async def watched(message: Message) -> None:
                if message["type"] == "http.response.start":
                    outcome.status = message["status"]
                await send(message)

            try:
                await self._app(scope, receive, watched)
            finally:
                outcome.error = state.get("error")  # what the answer told, while it was sent
