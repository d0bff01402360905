"""How every account ends: one record in the ledger, whatever way the request went.

What serves a request, over HTTP, gRPC or from a batch, does so inside `Recorder.settling(account)`.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from chassis import metrics
from chassis.errors import Code, PlatformError, http_status
from gateway.api.errors import error_code
from gateway.api.middleware import CLIENT_LEFT
from gateway.core.account import Account
from gateway.core.ledger import FinalUsages, settled
from gateway.core.ports import Ledger, RequestRecord
from gateway.core.repeats import HEADER
from gateway.core.services import Usage

log = logging.getLogger(__name__)

_MAX_ASKING = 1024  # requests whose exact usage is waited for, after their end
_PATIENCE_S = 10.0  # a generator that was killed is back by then
_CLOSE_S = 5.0


@dataclass(slots=True)
class Outcome:
    """How a request went; who serves it says so."""

    status: int = 0  # of the answer, as HTTP counts; 0: there was none
    error: PlatformError | None = None  # what was told in the answer, where it was not raised


class Recorder:
    """Settles accounts so that the end of a request's task does not end the writing, and nobody waits for the asking.

    `finals` is asked for what broke off; without it what was received is what counts.
    """

    def __init__(self, ledger: Ledger, finals: FinalUsages | None = None, *, patience_s: float = _PATIENCE_S) -> None:
        self._ledger = ledger
        self._finals = finals
        self._patience_s = patience_s
        for outcome in ("exact", "received", "lost"):  # so that a rate sees the first one
            metrics.USAGE_RECORDS.labels("gateway", outcome)
        self._writing: set[asyncio.Task[None]] = set()
        self._asking: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def settling(self, account: Account, *, counts_latency: bool = True) -> AsyncIterator[Outcome]:
        """Runs a request and settles its account at the end. Say the status of the answer once it is known."""
        outcome = Outcome()
        try:
            yield outcome
        except PlatformError as error:
            outcome.error = error
            outcome.status = outcome.status or http_status(error.code)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            account.finish_reason = "cancelled"
            raise
        except Exception:
            account.error_code = "internal_error"
            outcome.status = outcome.status or 500
            raise
        finally:
            await self._settle(account, outcome, counts_latency)

    async def write(self, record: RequestRecord) -> None:
        """Writes one record; goes on writing it where the caller is cancelled."""
        task = asyncio.create_task(self._write(record))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        await asyncio.shield(task)

    async def close(self) -> None:
        """Waits for what is being written, and a moment for what is asked; the next start settles the rest."""
        if self._asking:
            await asyncio.wait(self._asking, timeout=_CLOSE_S)
        for task in self._asking:
            task.cancel()
        if self._asking or self._writing:
            await asyncio.wait(self._asking | self._writing)

    async def _settle(self, account: Account, outcome: Outcome, counts_latency: bool) -> None:
        error = outcome.error
        if error is not None and error.code is Code.CANCELLED:
            account.finish_reason = "cancelled"
        elif error is not None:
            account.error_code = error_code(error)
        elif outcome.status >= 500:
            account.error_code = "internal_error"
        if counts_latency:
            measure_latency(account)
        if HEADER in account.answer_headers:
            metrics.REPEATS.labels("gateway", account.answer_headers[HEADER]).inc()
        record = account.record(outcome.status or CLIENT_LEFT)
        # What is an estimate is an upstream's: the generator knows nothing of it.
        is_final = record.is_exact or account.usage.is_estimate or len(self._asking) >= _MAX_ASKING
        if is_final or self._finals is None:
            _tell(account, record)
            await self.write(record)  # as it is; where it is not exact it says so
        else:
            task = asyncio.create_task(self._ask_and_write(record, account, self._finals))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _ask_and_write(self, record: RequestRecord, account: Account, finals: FinalUsages) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # only close() cancels: the start record stays
            try:
                record = await settled(record, account, finals, self._patience_s)
            except Exception:  # what was received is written all the same, and says that it is not exact
                log.exception("usage could not be asked for", extra={"usage_id": record.usage_id})
            _tell(account, record)
            await self._write(record)

    async def _write(self, record: RequestRecord) -> None:
        _measure_tokens(record)
        try:
            await self._ledger.record(record)
            metrics.USAGE_RECORDS.labels("gateway", "exact" if record.is_exact else "received").inc()
        except Exception:
            metrics.USAGE_RECORDS.labels("gateway", "lost").inc()
            # The answer has been sent, so nobody can be told: the line holds what the ledger lacks. Where there is a
            # start record, the next start of the gateway settles it.
            log.exception(
                "usage was not recorded",
                extra={
                    "lost_request_id": record.request_id,
                    "usage_id": record.usage_id,
                    "key_id": record.key_id,
                    "model": record.model,
                    "prompt_tokens": record.prompt_tokens,
                    "completion_tokens": record.completion_tokens,
                },
            )


def _tell(account: Account, record: RequestRecord) -> None:
    account.settled(Usage(record.prompt_tokens, record.completion_tokens, record.cached_tokens))


def measure_latency(account: Account) -> None:
    """Counts how long a person waited."""
    if account.ttft_s:
        metrics.TTFT_SECONDS.labels("gateway", _label(account.model)).observe(account.ttft_s)
    if account.tpot_s:
        metrics.TPOT_SECONDS.labels("gateway", _label(account.model)).observe(account.tpot_s)


def _measure_tokens(record: RequestRecord) -> None:
    """Counts what was used."""
    if not record.model:
        return
    for kind, num_tokens in (
        ("prompt", record.prompt_tokens),
        ("completion", record.completion_tokens),
        ("cached", record.cached_tokens),
    ):
        metrics.TOKENS.labels("gateway", _label(record.model), kind).inc(num_tokens)


def _label(model: str) -> str:
    """Tuned models count as their base: clients make as many of them as they like, and labels are bounded."""
    return model.partition(":")[0]
