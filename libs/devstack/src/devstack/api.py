"""The gateway's HTTP API as the command line uses it. Blocking; every call has a deadline."""

import json
from collections.abc import Iterator
from typing import Any

import httpx

_TIMEOUT = httpx.Timeout(60.0, connect=3.0)
_CHAT_TIMEOUT = httpx.Timeout(300.0, connect=3.0)


class ApiError(Exception):
    """The API said no, or did not answer. status is None where it did not."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Api:
    """A client of one base URL (which ends in /v1) with one key. Routes under /admin are named with their full path."""

    def __init__(self, base_url: str, key: str, transport: httpx.BaseTransport | None = None) -> None:
        self._base_url = base_url.rstrip("/")
        # trust_env off: a proxy of the environment has nothing to do with a loopback address.
        self._client = httpx.Client(
            headers={"authorization": f"Bearer {key}"}, timeout=_TIMEOUT, trust_env=False, transport=transport
        )

    def get(self, path: str, query: dict[str, Any] | None = None) -> Any:
        """GETs a path below the base URL."""
        return self._call("GET", path, params=query)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """POSTs JSON."""
        return self._call("POST", path, json=body)

    def put(self, path: str, body: dict[str, Any]) -> Any:
        """PUTs JSON."""
        return self._call("PUT", path, json=body)

    def patch(self, path: str, body: dict[str, Any]) -> Any:
        """PATCHes with JSON."""
        return self._call("PATCH", path, json=body)

    def delete(self, path: str) -> Any:
        """DELETEs."""
        return self._call("DELETE", path)

    def upload(self, path: str, name: str, content: bytes, content_type: str, fields: dict[str, str]) -> Any:
        """POSTs a file as multipart."""
        return self._call("POST", path, files={"file": (name, content, content_type)}, data=fields)

    def chat(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Streams a chat completion's chunks; raises ApiError, in the middle too."""
        try:
            with self._client.stream(
                "POST", self._url("/chat/completions"), json=body | {"stream": True}, timeout=_CHAT_TIMEOUT
            ) as response:
                if response.status_code >= 400:
                    response.read()
                    raise _error(response)
                for line in response.iter_lines():
                    if not line.startswith("data:"):
                        continue
                    data = line[5:].strip()
                    if data == "[DONE]":
                        return
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise ApiError(str(chunk["error"].get("message", chunk["error"])))
                    yield chunk
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _call(self, method: str, path: str, **arguments: Any) -> Any:
        try:
            response = self._client.request(method, self._url(path), **arguments)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code >= 400:
            raise _error(response)
        return response.json() if response.content else {}

    def _url(self, path: str) -> str:
        return self._base_url.removesuffix("/v1") + path if path.startswith("/admin") else self._base_url + path

    def _unreachable(self, error: httpx.HTTPError) -> ApiError:
        return ApiError(
            f"no answer from {self._base_url} ({error or type(error).__name__}): is it up? ./pressroom status"
        )


def _error(response: httpx.Response) -> ApiError:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    return ApiError(f"{message} (HTTP {response.status_code})", response.status_code)
