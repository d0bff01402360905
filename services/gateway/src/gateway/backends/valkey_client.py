"""A client for scripts in Valkey or Redis: one connection, over which the commands of all requests go in a pipeline.

redis-py takes 0.4 ms of a core for a script that Valkey runs in 0.03, and this is asked several times for each request.
What is not needed for it is not here: no cluster, no pool, no retries. Speaks RESP2.
"""

import asyncio
import hashlib
import ssl
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from chassis.corked import CorkedTransport

_DEFAULT_PORT = 6379
_MAX_WAITING = 4096
_MAX_REPLY_BYTES = 16 * 1024**2
_NAME = "pressroom-gateway"

Argument = str | int | bytes


class ValkeyError(Exception):
    """The server refused a command, or said what is no RESP."""


class Script:
    """A script in Lua, known to the server by its digest."""

    def __init__(self, source: str) -> None:
        self.source = source
        # The name that the protocol gives a script; nothing is kept safe by it.
        self.digest = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class ScriptCall:
    """What one run of a script gets."""

    keys: Sequence[str]
    args: Sequence[Argument]


class ValkeyClient:
    """Connects when it is first used, and again when the connection was lost."""

    def __init__(self, url: str) -> None:
        """The url is redis://[user][:password]@host[:port][/db], or rediss:// for TLS."""
        self._url = urlsplit(url)
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[Argument], *, timeout_s: float) -> Any:
        """Runs a script; raises ValkeyError, OSError, and TimeoutError where the server takes longer."""
        (reply,) = await self.run_all(script, [ScriptCall(keys, args)], timeout_s=timeout_s)
        return reply

    async def run_all(self, script: Script, calls: Sequence[ScriptCall], *, timeout_s: float) -> list[Any]:
        """Runs a script several times in one round trip; raises what the first one that fails raises."""
        connection = self._connection
        if connection is None or connection.is_lost:
            async with asyncio.timeout(timeout_s):
                connection = await self._connected()
        sent = [connection.send(_command("EVALSHA", script.digest, call)) for call in calls]
        await _answered(sent, timeout_s)
        unknown = [place for place, one in enumerate(sent) if _is_unknown_script(one.exception())]
        for place in unknown:
            sent[place] = connection.send(_command("EVAL", script.source, calls[place]))
        if unknown:
            await _answered(sent, timeout_s)
        return [one.result() for one in sent]

    def drop(self) -> None:
        """Closes the connection, and fails what waits on it: for one that does not answer. The next call connects."""
        if self._connection is not None:
            self._connection.abort()
            self._connection = None

    async def _connected(self) -> "_Connection":
        if self._connection is not None and not self._connection.is_lost:
            return self._connection
        async with self._connecting:
            if self._connection is None or self._connection.is_lost:
                self._connection = await self._connect()
            return self._connection

    async def _connect(self) -> "_Connection":
        url, loop = self._url, asyncio.get_running_loop()
        tls = ssl.create_default_context() if url.scheme == "rediss" else None
        _, connection = await loop.create_connection(
            _Connection, url.hostname or "127.0.0.1", url.port or _DEFAULT_PORT, ssl=tls
        )
        try:
            greetings: list[tuple[str, ...]] = [("CLIENT", "SETNAME", _NAME)]
            if database := url.path.strip("/"):
                greetings.insert(0, ("SELECT", database))
            if url.password:
                user = (unquote(url.username),) if url.username else ()
                greetings.insert(0, ("AUTH", *user, unquote(url.password)))
            await asyncio.gather(*(connection.send(_encoded(greeting)) for greeting in greetings))
        except BaseException:
            connection.abort()
            raise
        return connection


async def _answered(sent: Sequence[asyncio.Future[Any]], timeout_s: float) -> None:
    """Waits until all are answered; raises TimeoutError where the server, rather than this process, is too slow."""
    try:
        await asyncio.wait(sent, timeout=timeout_s)
        # A loop that was busy hears of its timers before it reads what came meanwhile: give it a turn to read.
        for _ in range(2):
            if all(one.done() for one in sent):
                return
            await asyncio.sleep(0)
        if not all(one.done() for one in sent):
            raise TimeoutError
    except BaseException:
        for one in sent:
            one.cancel()
        raise


def _is_unknown_script(error: BaseException | None) -> bool:
    return isinstance(error, ValkeyError) and str(error).startswith("NOSCRIPT")


class _Connection(asyncio.Protocol):
    """Replies come in the order of the commands; one whose caller has gone is dropped when it comes."""

    def __init__(self) -> None:
        self.is_lost = False
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._raw = cast(asyncio.Transport, transport)
        self._transport = CorkedTransport(self._raw, self._loop)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        waiting, self._waiting = self._waiting, deque()
        for future in waiting:
            if not future.done():
                future.set_exception(ConnectionError("valkey closed the connection"))
                future.exception()  # its caller may have gone meanwhile

    def data_received(self, data: bytes) -> None:
        self._received += data
        place = 0
        try:
            while self._waiting:
                reply, place = _parsed(self._received, place)
                future = self._waiting.popleft()
                if future.done():
                    continue
                if isinstance(reply, ValkeyError):
                    future.set_exception(reply)
                else:
                    future.set_result(reply)
        except _Incomplete:
            if len(self._received) - place > _MAX_REPLY_BYTES:
                self.abort()
        except (ValueError, IndexError):  # no RESP: what follows cannot be told apart any more
            self.abort()
        self._received = self._received[place:]

    def send(self, command: bytes) -> asyncio.Future[Any]:
        """Sends a command; the future has its reply."""
        if self.is_lost or len(self._waiting) >= _MAX_WAITING:
            raise ConnectionError("valkey does not answer")
        future: asyncio.Future[Any] = self._loop.create_future()
        self._waiting.append(future)
        self._transport.write(command)
        return future

    def abort(self) -> None:
        """Closes at once."""
        self._raw.abort()


class _Incomplete(Exception):
    """More has to come."""


def _parsed(data: bytes, place: int) -> tuple[Any, int]:
    """The reply that begins there, and where the next one does; an error is returned, not raised."""
    end = data.find(b"\r\n", place)
    if end < 0:
        raise _Incomplete
    kind, line, after = data[place : place + 1], data[place + 1 : end], end + 2
    match kind:
        case b":":
            return int(line), after
        case b"+":
            return line, after
        case b"-":
            return ValkeyError(line.decode(errors="replace")), after
        case b"$":
            length = int(line)
            if length < 0:
                return None, after
            if len(data) < after + length + 2:
                raise _Incomplete
            return data[after : after + length], after + length + 2
        case b"*":
            replies = []
            for _ in range(int(line)):
                reply, after = _parsed(data, after)
                replies.append(reply)
            return replies, after
    raise ValueError("no reply begins here")


def _command(name: str, script: str, call: ScriptCall) -> bytes:
    return _encoded((name, script, len(call.keys), *call.keys, *call.args))


def _encoded(parts: Iterable[Argument]) -> bytes:
    encoded = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
    return b"*%d\r\n" % len(encoded) + b"".join([b"$%d\r\n%b\r\n" % (len(part), part) for part in encoded])
