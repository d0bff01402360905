"""Accounts for every request on the inference routes that passed authentication: one record, whatever way it ends."""

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chassis import metrics, telemetry
from chassis.errors import Code, PlatformError, http_status
from gateway.api.errors import error_code
from gateway.api.middleware import CLIENT_LEFT
from gateway.core.account import Account
from gateway.core.ports import Ledger, RequestRecord

log = logging.getLogger(__name__)

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


class Recorder:
    """Writes records to the ledger so that the end of a request's task does not end the writing."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._writing: set[asyncio.Task[None]] = set()

    async def write(self, record: RequestRecord) -> None:
        """Writes one record; goes on writing it where the caller is cancelled."""
        task = asyncio.create_task(self._write(record))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        await asyncio.shield(task)

    async def close(self) -> None:
        """Waits for what is being written."""
        if self._writing:
            await asyncio.wait(self._writing)

    async def _write(self, record: RequestRecord) -> None:
        try:
            await self._ledger.record(record)
        except Exception:
            # The answer has been sent, so nobody can be told: the line holds what the ledger lacks.
            log.exception(
                "usage was not recorded",
                extra={
                    "lost_request_id": record.request_id,
                    "key_id": record.key_id,
                    "model": record.model,
                    "prompt_tokens": record.prompt_tokens,
                    "completion_tokens": record.completion_tokens,
                },
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
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except PlatformError as error:
            state["error"] = error
            status = status or http_status(error.code)
            raise
        except asyncio.CancelledError:  # the server shuts down and does not wait any longer
            account.finish_reason = "cancelled"
            raise
        except Exception:
            account.error_code = "internal_error"
            status = status or 500
            raise
        finally:
            await self._settle(account, state.get("error"), status or CLIENT_LEFT)

    async def _settle(self, account: Account, error: PlatformError | None, status: int) -> None:
        if error is not None and error.code is Code.CANCELLED:
            account.finish_reason = "cancelled"
        elif error is not None:
            account.error_code = error_code(error)
        elif status >= 500:
            account.error_code = "internal_error"
        measure_latency(account)
        measure_tokens(account)
        await self._recorder.write(account.record(status))


def measure_latency(account: Account) -> None:
    """Counts how long a person waited."""
    if account.ttft_s:
        metrics.TTFT_SECONDS.labels("gateway", _label(account)).observe(account.ttft_s)
    if account.tpot_s:
        metrics.TPOT_SECONDS.labels("gateway", _label(account)).observe(account.tpot_s)


def measure_tokens(account: Account) -> None:
    """Counts what was used."""
    if not account.model:
        return
    usage = account.usage
    for kind, num_tokens in (
        ("prompt", usage.prompt_tokens),
        ("completion", usage.completion_tokens),
        ("cached", usage.cached_tokens),
    ):
        metrics.TOKENS.labels("gateway", _label(account), kind).inc(num_tokens)


def _label(account: Account) -> str:
    """Tuned models count as their base: clients make as many of them as they like, and labels are bounded."""
    return account.model.partition(":")[0]
