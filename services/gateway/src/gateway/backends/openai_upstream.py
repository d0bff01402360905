"""An OpenAI-compatible server elsewhere (a vendor, vLLM, LiteLLM) as what answers a graph.

Implements services.Completer. The connection is closed when the events are, so that the server stops its work. The
client's own key goes no further than this process: the server gets its own, or none.
"""

import asyncio
import email.utils
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field

import aiohttp
import orjson
from opentelemetry import trace
from pydantic import SecretStr

from chassis import telemetry
from chassis.errors import Code, PlatformError
from gateway.backends.openai_reading import AnswerReader, Malformed, Reported
from gateway.backends.openai_request import Dialect, is_echo, request_of
from gateway.core.services import Generation, GenerationEvent

_log = logging.getLogger(__name__)

_MAX_CONNECTIONS = 4096  # of all upstreams together; who finds none free waits within the time to the first byte
_KEEPALIVE_S = 4.0  # below the 5 s after which uvicorn, and so vLLM and LiteLLM, closes an idle connection
_CONNECT_TIMEOUT_S = 5.0
_TAIL_TIMEOUT_S = 0.25
_MAX_LINE_BYTES = 1024**2
_MAX_ANSWER_BYTES = 16 * 1024**2
_MAX_ERROR_BYTES = 64 * 1024
_MAX_RETRY_AFTER_S = 3600.0
_DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server is, how it is spoken to and how long it is waited for."""

    name: str  # of the graph that it answers
    base_url: str  # without a slash in the end
    key: SecretStr | None
    timeout_s: float
    first_byte_timeout_s: float
    max_running: int  # completions at once
    dialect: Dialect = field(default_factory=Dialect)


def open_session() -> aiohttp.ClientSession:
    """The connections to all upstreams. Needs a running loop; the caller closes it."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=_MAX_CONNECTIONS, keepalive_timeout=_KEEPALIVE_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept"),
    )


class OpenAiUpstream:
    """Asks one server. The session belongs to the caller."""

    def __init__(self, session: aiohttp.ClientSession, endpoint: Endpoint) -> None:
        self._session = session
        self._endpoint = endpoint
        # No compression: events are to come one by one, and a small answer cannot become a large one here.
        self._headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if endpoint.key is not None:
            self._headers["authorization"] = f"Bearer {endpoint.key.get_secret_value()}"

    async def generate(self, call: Generation, *, timeout_s: float) -> AsyncGenerator[GenerationEvent]:
        """Streams the completion; closing or cancelling closes the connection, which stops the server's work."""
        reader = AnswerReader(call, has_running_usage=self._endpoint.dialect.has_extensions)
        patience = _Patience(self._endpoint, timeout_s)
        span = telemetry.tracer().start_span(f"upstream.{self._endpoint.name}", kind=trace.SpanKind.CLIENT)
        try:
            response = await self._post(call, span, patience)
            try:
                if is_echo(call):
                    for event in reader.take_echo(await _read(response, _MAX_ANSWER_BYTES)):
                        yield event
                else:
                    async with aclosing(self._answer(response, reader, patience)) as events:
                        async for event in events:
                            yield event
                yield reader.finish()
                await _read_tail(response)
            finally:
                response.close()  # gives nothing back that was read to its end: such a connection is in the pool again
        except PlatformError as error:
            span.set_status(trace.StatusCode.ERROR, error.code.value)
            raise
        except (aiohttp.ClientError, OSError, Malformed, Reported) as error:
            translated = self._translated(error, patience)
            span.set_status(trace.StatusCode.ERROR, translated.code.value)
            raise translated from error
        except (asyncio.CancelledError, GeneratorExit):
            span.set_attribute("cancelled", True)
            raise
        finally:
            span.end()

    async def _post(self, call: Generation, span: trace.Span, patience: "_Patience") -> aiohttp.ClientResponse:
        """Sends the request; raises what a status other than 200 means, and what request_of does."""
        path, body = request_of(call, self._endpoint.dialect)
        async with asyncio.timeout_at(patience.first_at_s):
            response = await self._session.post(
                f"{self._endpoint.base_url}/{path}",
                data=body,
                headers={**self._headers, "traceparent": telemetry.traceparent(span)},
                timeout=aiohttp.ClientTimeout(total=patience.total_s, sock_connect=_CONNECT_TIMEOUT_S),
                allow_redirects=False,
            )
            if response.status == 200:
                return response
            try:
                said = await _read(response, _MAX_ERROR_BYTES)
            except Malformed:
                said = b""
            finally:
                response.close()
        raise self._refusal(response, said)

    async def _answer(
        self, response: aiohttp.ClientResponse, reader: AnswerReader, patience: "_Patience"
    ) -> AsyncGenerator[GenerationEvent]:
        if response.content_type == "application/json":  # it knows no streams
            for event in reader.take(await _read(response, _MAX_ANSWER_BYTES)):
                yield event
            return
        if response.content_type != "text/event-stream":
            raise Malformed(f"{response.content_type[:100]!r} where a stream of events is due")
        lines = _Lines()
        async with asyncio.timeout_at(patience.first_at_s):
            data = await response.content.readany()
        patience.has_begun = True
        while data:
            for payload in lines.payloads(data):
                if payload == _DONE:
                    return
                for event in reader.take(payload):
                    yield event
            data = await response.content.readany()

    def _refusal(self, response: aiohttp.ClientResponse, said: bytes) -> PlatformError:
        """The one place where a server's status becomes an error of ours."""
        error, status = _error_object(said), response.status
        message = str(error.get("message") or "")[:1000]
        if status in (400, 413, 422):
            reason, param = _string(error.get("code")), _string(error.get("param"))
            code = Code.OUT_OF_RANGE if reason == "context_length_exceeded" else Code.INVALID_ARGUMENT
            return PlatformError(code, message or self._says("refuses the request"), param=param, reason=reason)
        if status == 429:
            return PlatformError(
                Code.OVERLOADED,
                self._says("is asked too often"),
                reason="upstream_rate_limited",
                retry_after_s=_retry_after_s(response.headers.get("retry-after", "")) or 1.0,
            )
        if status >= 500 or status in (408, 409, 425):
            retry_after_s = _retry_after_s(response.headers.get("retry-after", "")) or 1.0
            return PlatformError(Code.UNAVAILABLE, self._says(f"failed with {status}"), retry_after_s=retry_after_s)
        # 401 and 403 are about our key, 404 about our configuration: an operator is to look at it, not the client.
        _log.error("upstream refuses us", extra={"upstream": self._endpoint.name, "status": status, "said": message})
        return self._misconfigured(f"refuses this gateway ({status})")

    def _translated(self, error: Exception, patience: "_Patience") -> PlatformError:
        """The one place where failures on the way become errors of ours."""
        _log.warning("upstream failed", extra={"upstream": self._endpoint.name, "error": repr(error)[:500]})
        match error:
            case TimeoutError() if patience.is_over():
                return PlatformError(Code.DEADLINE_EXCEEDED, self._says("did not answer in time"))
            case TimeoutError():
                # Another one may answer, but this one is not to take as long once more.
                late = self._says("did not begin to answer in time")
                return PlatformError(Code.UNAVAILABLE, late, retryable=False, retry_after_s=1.0)
            case aiohttp.ClientConnectorCertificateError() | aiohttp.ClientConnectorSSLError():
                return self._misconfigured("has no certificate that can be trusted")
            case Malformed():
                return PlatformError(Code.UNAVAILABLE, self._says(f"sent {error}"), retry_after_s=1.0)
            case Reported():
                return PlatformError(Code.UNAVAILABLE, self._says(f"failed: {error}"), retry_after_s=1.0)
        return PlatformError(Code.UNAVAILABLE, self._says("is not available"), retry_after_s=1.0)

    def _misconfigured(self, what: str) -> PlatformError:
        return PlatformError(
            Code.UNAVAILABLE, self._says(what), retryable=False, reason="upstream_misconfigured", retry_after_s=60.0
        )

    def _says(self, what: str) -> str:
        return f"the upstream of {self._endpoint.name!r} {what}"


class _Patience:
    """How long one answer is waited for, on the loop's clock."""

    def __init__(self, endpoint: Endpoint, timeout_s: float) -> None:
        self.total_s = min(endpoint.timeout_s, timeout_s)
        self._now_s = asyncio.get_running_loop().time
        now_s = self._now_s()
        self._over_at_s = now_s + self.total_s
        self.first_at_s = min(now_s + endpoint.first_byte_timeout_s, self._over_at_s)
        self.has_begun = False

    def is_over(self) -> bool:
        """No more time, rather than no first byte."""
        return self.has_begun or self._now_s() >= self._over_at_s


class _Lines:
    """Cuts the payloads of server-sent events out of what arrives."""

    def __init__(self) -> None:
        self._begun = b""

    def payloads(self, data: bytes) -> Iterator[bytes]:
        """The payloads that are complete; raises Malformed for a line without end."""
        *lines, self._begun = (self._begun + data).split(b"\n")
        if len(self._begun) > _MAX_LINE_BYTES:
            raise Malformed(f"a line of more than {_MAX_LINE_BYTES} bytes")
        for line in lines:
            if line.startswith(b"data:"):  # the rest is comments, event names and the empty lines between
                yield line[5:].strip()


async def _read(response: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    """The body; raises Malformed for one that is larger."""
    parts: list[bytes] = []
    num_bytes = 0
    while data := await response.content.readany():
        parts.append(data)
        num_bytes += len(data)
        if num_bytes > most_bytes:
            raise Malformed(f"more than {most_bytes} bytes")
    return b"".join(parts)


async def _read_tail(response: aiohttp.ClientResponse) -> None:
    """Reads what follows the last event, so that the connection can serve again; one that stays open is given up."""
    try:
        async with asyncio.timeout(_TAIL_TIMEOUT_S):
            await _read(response, _MAX_ERROR_BYTES)
    except (TimeoutError, aiohttp.ClientError, OSError, Malformed):
        return


def _error_object(said: bytes) -> dict[str, object]:
    """The `error` of OpenAI's envelope; empty where there is none (an HTML page of a proxy)."""
    try:
        error = orjson.loads(said)["error"]
    except (ValueError, KeyError, TypeError, IndexError):
        return {}
    return error if isinstance(error, dict) else {"message": error} if isinstance(error, str) else {}


def _string(value: object) -> str | None:
    return value[:200] if isinstance(value, str) else None


def _retry_after_s(value: str) -> float | None:
    """Seconds that a Retry-After header asks for, which has a number or a date."""
    if value.isascii() and value.isdecimal():
        return min(float(value), _MAX_RETRY_AFTER_S)
    try:
        left_s = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        return min(max(0.0, left_s), _MAX_RETRY_AFTER_S)
    except (ValueError, TypeError):
        return None
