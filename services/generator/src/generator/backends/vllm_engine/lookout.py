"""Keeps an eye on vLLM: whether it answers, what it serves, how full it is. One that comes back is looked at anew."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from chassis.errors import Code, PlatformError
from generator.backends.vllm_engine.client import Gauges, ServedModel, VllmClient

log = logging.getLogger(__name__)


class Lookout:
    """`why_not` says why vLLM cannot be used, "" where it can. `on_found` is awaited when it can be used again."""

    def __init__(
        self,
        client: VllmClient,
        model_name: str,
        on_found: Callable[[ServedModel, list[ServedModel]], Awaitable[None]],
    ) -> None:
        self._client = client
        self._model_name = model_name
        self._on_found = on_found
        self.why_not = "it has not answered yet"
        self.gauges = Gauges()

    async def run(self, look_s: float) -> None:
        """Looks for ever."""
        while True:
            await self.look()
            await asyncio.sleep(look_s)

    async def look(self) -> None:
        """Looks once."""
        try:
            await self._client.check_health()
            if self.why_not:
                await self._meet()
                log.info("vLLM answers", extra={"url": self._client.url})
            self.gauges = await self._client.gauges()
            self.why_not = ""
        except PlatformError as error:
            self.note(error.message)

    def note(self, why: str) -> None:
        """Notes that vLLM cannot be used before it was looked at again."""
        if not self.why_not:
            log.error("vLLM cannot be used", extra={"url": self._client.url, "why": why})
        self.why_not = why

    async def _meet(self) -> None:
        models = await self._client.models()
        bases = [model for model in models if model.parent is None]
        wanted = [model for model in bases if model.name == self._model_name] if self._model_name else bases
        if len(wanted) != 1:
            names = ", ".join(repr(model.name) for model in bases) or "no model"
            message = f"it serves {names}: set GENERATOR_VLLM_MODEL to one of them"
            raise PlatformError(Code.FAILED_PRECONDITION, message)
        await self._try_out(wanted[0].name)
        await self._on_found(wanted[0], models)

    async def _try_out(self, name: str) -> None:
        """An older vLLM, or another server with its API, ignores what it does not know: then nothing can be counted."""
        body: dict[str, Any] = {"model": name, "prompt": [0], "max_tokens": 1, "temperature": 0.0}
        answer = await self._client.complete(body | {"return_token_ids": True})
        choices = answer.get("choices") or [{}]
        if not isinstance(choices[0], dict) or len(choices[0].get("token_ids") or ()) != 1:
            raise PlatformError(
                Code.FAILED_PRECONDITION, "it does not return token ids: vLLM 0.10.2 or later is needed"
            )
