"""Answers that an encoder gives: asked inside the stages of serving, and watched for a client that leaves."""

import asyncio
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chassis.errors import Code, PlatformError
from gateway.api.inference import finished_before_client_left
from gateway.core.catalog import model_not_found
from gateway.core.services import Embedded, Embedder, Usage
from gateway.core.serving import Ask, Serving

_THREAD_FROM_VECTORS = 64  # more take over 5 ms to write and would hold up the event loop


class EncoderResponse(Response):
    """Asks the encoder while it answers, and writes the answer by `write`."""

    def __init__(
        self, serving: Serving, ask: Ask, encode: Callable[[], Awaitable[Embedded]], write: Callable[[Embedded], bytes]
    ) -> None:
        super().__init__()
        self._serving = serving
        self._ask = ask
        self._encode = encode
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Works until everything was sent or the client left."""
        if not await finished_before_client_left(self._answer(scope, receive, send), receive):
            self._ask.account.finish_reason = "cancelled"

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        account = self._ask.account
        async with self._serving.hold(self._ask):
            embedded = await self._encode()
            account.model = self._ask.model
            account.done(Usage(prompt_tokens=embedded.num_tokens))
            account.finish_reason = "stop"
        if len(embedded.vectors) > _THREAD_FROM_VECTORS:
            content = await asyncio.to_thread(self._write, embedded)
        else:
            content = self._write(embedded)
        await Response(content, media_type="application/json")(scope, receive, send)


async def embed(embedder: Embedder, ask: Ask, *, truncate: bool, dimensions: int = 0) -> Embedded:
    """The vectors of what is asked; raises NOT_FOUND for a name that is no encoder's, in the words of all routes."""
    try:
        return await embedder.embed(
            ask.model,
            list(ask.inputs),  # type: ignore[arg-type]  # all texts or all token lists: the routes' bodies say so
            truncate=truncate,
            dimensions=dimensions,
            timeout_s=ask.deadline.remaining_s(),
        )
    except PlatformError as error:
        if error.code is Code.NOT_FOUND:
            raise model_not_found(ask.model) from None
        raise
