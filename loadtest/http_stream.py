"""Sends one chat request and reads its stream, on a connection of its own.

The standard library's client, since it hands over what the socket has as soon as it has it, and since gevent's patched
sockets make it cooperative under Locust. The connection is made anew for each request, as by independent clients: its
set-up is part of the time to the first token.
"""

import http.client
import json
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

from loadtest.answer import Answer
from loadtest.rows import STOPPED, Row
from loadtest.target import Target

_READ_BYTES = 65_536


def ask(target: Target, body: Mapping[str, Any], row: Row, *, timeout_s: float, clock: Callable[[], float]) -> None:
    """Blocks until the answer has ended or timeout_s is over, and fills the row. Failures are told there, not raised.

    Where the caller's greenlet is killed meanwhile, the row says so and the exception goes on.
    """
    answer = Answer()
    row.sent_s = clock()
    connection = _connection(target.base_url, timeout_s)
    try:
        _exchange(connection, target, body, answer, row, row.sent_s + timeout_s, clock)
    except TimeoutError:
        answer.error = "timeout"
    except ConnectionRefusedError:
        answer.error = "connection_refused"
    except (OSError, http.client.HTTPException):
        answer.error = "disconnected"
    except Exception:
        answer.error = "client_error"
        raise
    except BaseException:
        answer.error = STOPPED
        raise
    finally:
        row.done_s = clock()
        row.take(answer)
        connection.close()


def _exchange(
    connection: http.client.HTTPConnection,
    target: Target,
    body: Mapping[str, Any],
    answer: Answer,
    row: Row,
    deadline_s: float,
    clock: Callable[[], float],
) -> None:
    path = urllib.parse.urlsplit(target.base_url).path + "/chat/completions"
    headers = {"authorization": f"Bearer {target.key}", "content-type": "application/json"}
    connection.request("POST", path, json.dumps(body).encode(), headers)
    response = connection.getresponse()
    row.status = response.status
    row.request_id = response.getheader("x-request-id", "")
    row.trace_id = response.getheader("x-trace-id", "")
    if response.status != 200:
        answer.refuse(response.read(_READ_BYTES))
        return
    while data := response.read1(_READ_BYTES):
        now_s = clock()
        answer.feed(data, now_s)
        if now_s >= deadline_s:
            raise TimeoutError
        if connection.sock is not None:  # None where the answer ends with the connection
            connection.sock.settimeout(deadline_s - now_s)
    answer.close()


def _connection(base_url: str, timeout_s: float) -> http.client.HTTPConnection:
    parts = urllib.parse.urlsplit(base_url)
    make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return make(parts.hostname or "localhost", parts.port, timeout=timeout_s)
