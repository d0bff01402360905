"""The start record of every request, and how one is settled whose end nobody here has seen.

A request is written down before a model works for it, and struck off in the transaction that writes what it used. Where
the stream broke off, the generator has the last word; where it cannot be asked, what was received is what counts, and
the row says that it is not exact. Knows neither SQLite nor gRPC.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from chassis.errors import PlatformError
from gateway.core.account import Account
from gateway.core.money import Bound, Purse, purses_of
from gateway.core.ports import RequestRecord
from gateway.core.services import Usage
from gateway.core.serving import Ask
from gateway.core.sizing import Size

log = logging.getLogger(__name__)

_ASK_S = 2.0  # one question to all replicas
_RETRY_S = 0.1
_MAX_RETRY_S = 1.0
_RECOVERY_S = 60.0  # a generator that was started together with us loads its model meanwhile
_MAX_RECOVERING = 8


@dataclass(frozen=True, slots=True)
class Opening:
    """What is written before a model works: enough to account for the request if this process dies."""

    usage_id: str
    request_id: str
    trace_id: str
    traceparent: str
    tenant: str
    key_id: str
    model: str
    route: str
    started_unix_ms: int


@dataclass(frozen=True, slots=True)
class Final:
    """What the replicas of the generator say of a usage id. is_complete: every one of them has answered."""

    usage: Usage
    num_calls: int
    is_complete: bool


class Openings(Protocol):
    """The start records."""

    async def open(self, opening: Opening, bound: Bound, purses: Sequence[Purse]) -> None:
        """Writes one and reserves what the bound costs in each purse, or raises RATE_LIMITED and does neither.

        A crash of this process does not lose it once this has returned.
        """
        ...

    async def left_open(self) -> Sequence[Opening]:
        """Those that an earlier process has left."""
        ...


class Settled(Protocol):
    """Where records go; see ports.Ledger."""

    async def record(self, record: RequestRecord) -> None:
        """Writes what was used and strikes off the start record, once for each usage id."""
        ...


class FinalUsages(Protocol):
    """The generator's book of usage."""

    async def final(self, usage_id: str, *, timeout_s: float) -> Final:
        """Ends what runs under the id and tells what it used; nothing more can be used under it then."""
        ...


class Sizes(Protocol):
    """Knows how much a request can use."""

    async def exact(self, ask: Ask) -> Size:
        """See core.sizing."""
        ...


class StartRecords:
    """The stage of Serving that writes the start record and reserves the budget. What it opens, Settling closes."""

    def __init__(self, openings: Openings, sizes: Sizes) -> None:
        self._openings = openings
        self._sizes = sizes

    @asynccontextmanager
    async def hold(self, ask: Ask) -> AsyncIterator[None]:
        """Raises RATE_LIMITED with reason insufficient_quota where a budget does not hold the request."""
        purses = purses_of(ask.principal)
        bound = (await self._sizes.exact(ask)).bound() if purses else Bound()
        await self._openings.open(_opening(ask), bound, purses)
        yield


def _opening(ask: Ask) -> Opening:
    account = ask.account
    return Opening(
        usage_id=account.usage_id,
        request_id=account.request_id,
        trace_id=account.trace_id,
        traceparent=account.traceparent,
        tenant=ask.principal.tenant,
        key_id=ask.principal.key_id,
        model=ask.model,
        route=account.route,
        started_unix_ms=account.started_unix_ms,
    )


async def settled(record: RequestRecord, account: Account, finals: FinalUsages, patience_s: float) -> RequestRecord:
    """Returns the record with what the generator says was used, or with what was received, as not exact."""
    final = await _final(record.usage_id, finals, max(1, account.num_started), patience_s)
    if final is None:
        return replace(record, is_exact=False)
    if final.num_calls < account.num_started:  # a process that worked for it has died
        return replace(record, is_exact=False)
    return _with_usage(record, final.usage)


async def recover(openings: Openings, ledger: Settled, finals: FinalUsages, patience_s: float = _RECOVERY_S) -> None:
    """Settles what an earlier process left open."""
    left = await openings.left_open()
    slots = asyncio.Semaphore(_MAX_RECOVERING)

    async def settle(opening: Opening) -> None:
        async with slots:
            final = await _final(opening.usage_id, finals, 1, patience_s)
            record = _lost(opening)
            if final is not None and final.num_calls:
                record = _with_usage(record, final.usage)
            try:
                await ledger.record(record)
            except PlatformError as error:  # it stays open, for the next start
                log.error(
                    "a left request was not settled", extra={"usage_id": opening.usage_id, "error": error.message}
                )

    async with asyncio.TaskGroup() as group:
        for opening in left:
            group.create_task(settle(opening))
    if left:
        log.warning("requests of an earlier process were settled", extra={"num_requests": len(left)})


async def _final(usage_id: str, finals: FinalUsages, num_calls: int, patience_s: float) -> Final | None:
    """Asks until enough calls are known or all replicas have answered; None when patience has run out."""
    pause_s = _RETRY_S
    try:
        async with asyncio.timeout(patience_s):
            while True:
                try:
                    final = await finals.final(usage_id, timeout_s=_ASK_S)
                except PlatformError as error:
                    log.info("usage cannot be asked for yet", extra={"usage_id": usage_id, "error": error.message})
                else:
                    if final.is_complete or final.num_calls >= num_calls:
                        return final
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _MAX_RETRY_S)
    except TimeoutError:
        return None


def _with_usage(record: RequestRecord, usage: Usage) -> RequestRecord:
    return replace(
        record,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        is_exact=True,
    )


def _lost(opening: Opening) -> RequestRecord:
    """The record of a request whose gateway died."""
    return RequestRecord(
        request_id=opening.request_id,
        trace_id=opening.trace_id,
        traceparent=opening.traceparent,
        tenant=opening.tenant,
        key_id=opening.key_id,
        model=opening.model,
        route=opening.route,
        prompt_tokens=0,
        completion_tokens=0,
        cached_tokens=0,
        finish_reason="error",
        http_status=500,
        stream=False,
        started_unix_ms=opening.started_unix_ms,
        duration_s=0.0,
        error_code="gateway_died",
        usage_id=opening.usage_id,
        is_exact=False,
    )
