"""The limits that no key and no tenant has, but a model or the whole platform."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Protocol

from chassis.errors import PlatformError
from gateway.core.audit import Change
from gateway.core.policy import Limit

log = logging.getLogger(__name__)

_REFRESH_S = 1.0


class LimitStore(Protocol):
    """Keeps the platform's limits."""

    async def limits(self) -> tuple[Limit, ...]:
        """Reads them."""
        ...

    async def set_limits(self, limits: Sequence[Limit], change: Change) -> None:
        """Replaces them; durable, and in the audit log, when it returns."""
        ...


class PlatformLimits:
    """The limits that hold for all tenants together: of one model, or of the whole platform where none is named."""

    def __init__(self, store: LimitStore) -> None:
        self._store = store
        self.limits: tuple[Limit, ...] = ()

    async def refresh(self) -> None:
        """Reads what another gateway may have written."""
        self.limits = await self._store.limits()

    async def replace(self, actor: str, limits: Sequence[Limit]) -> None:
        """Sets them, as that key ordered: here at once, in other gateways within a second."""
        change = Change(actor, "limits.replaced", "platform", {"limits": [asdict(limit) for limit in limits]})
        await self._store.set_limits(limits, change)
        self.limits = tuple(limits)

    async def run(self) -> None:
        """Keeps them fresh until cancelled; what was known holds while the database does not answer."""
        while True:
            await asyncio.sleep(_REFRESH_S)
            try:
                await self.refresh()
            except PlatformError as error:
                log.warning("the platform's limits could not be read", extra={"error": error.message})
