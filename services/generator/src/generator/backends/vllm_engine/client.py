"""The connection to a vLLM server: its HTTP API with a deadline on everything, and its errors translated here.

Knows nothing of requests and their texts. Closing a stream early is what has vLLM abort the work behind it.
"""

import contextlib
import json
import re
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from chassis.errors import Code, PlatformError
from generator.backends.vllm_engine import wire

_CONNECT_S = 3.0
_CALL_S = 10.0  # a call that computes nothing
_LOAD_S = 120.0
_MAX_LINE_BYTES = 8 * 1024 * 1024
_SAMPLE = re.compile(r"^vllm:(\w+)(?:\{(.*)\})? ([0-9.eE+-]+)$", re.MULTILINE)
_NUM_BLOCKS = re.compile(r'num_gpu_blocks="(\d+)"')


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What vLLM says that it serves; `parent` is None for a base."""

    name: str
    context_length: int | None
    parent: str | None


@dataclass(frozen=True, slots=True)
class Gauges:
    """vLLM's own account of its load, over all that ask it."""

    blocks_used: int = 0
    blocks_total: int = 0
    num_preemptions: int = 0


class VllmClient:
    """Used on one event loop; close it when nothing is asked any more."""

    def __init__(
        self, url: str, api_key: str | None, silence_s: float, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self.url = url.rstrip("/")
        self._silence_s = silence_s
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(_CALL_S, connect=_CONNECT_S),
            # The engine bounds how much is asked at once: a pool's bound would be a second queue that nobody sees.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            transport=transport,
            trust_env=False,  # vLLM is a neighbour: a proxy of the environment is for the world outside
            verify=url.startswith("https://"),  # reading the certificates takes a tenth of a second of the loop
        )

    async def models(self) -> list[ServedModel]:
        """Returns bases and adapters that answer now."""
        answer = await self._call("GET", "/v1/models")
        try:
            return [ServedModel(m["id"], m.get("max_model_len"), m.get("parent")) for m in answer["data"]]
        except (KeyError, TypeError) as error:
            raise wire.broken(f"its list of models lacks {error}") from error

    async def check_health(self) -> None:
        """Raises PlatformError unless vLLM's engine lives; an answer of its HTTP server alone does not say so."""
        await self._call("GET", "/health")

    async def gauges(self) -> Gauges:
        """Reads vLLM's metrics."""
        with _translated():
            text = (await self._http.get("/metrics")).text
        usage, blocks, preemptions = 0.0, 0, 0.0
        for name, labels, value in _SAMPLE.findall(text):
            if name == "kv_cache_usage_perc":  # a share of 1, whatever its name says; one sample an engine
                usage = max(usage, float(value))
            elif name == "num_preemptions_total":
                preemptions += float(value)
            elif name == "cache_config_info" and (found := _NUM_BLOCKS.search(labels)):
                blocks = int(found[1])
        return Gauges(round(usage * blocks), blocks, int(preemptions))

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Asks for a completion in one piece."""
        return await self._call("POST", "/v1/completions", body, self._silence_s)

    async def stream(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Yields the events of a completion up to its [DONE]. Close it early (aclosing) and vLLM stops computing.

        Raises PlatformError, UNAVAILABLE where the stream breaks off or nothing is heard for too long.
        """
        timeout = httpx.Timeout(self._silence_s, connect=_CONNECT_S)
        with _translated():
            async with self._http.stream("POST", "/v1/completions", json=body, timeout=timeout) as response:
                if response.status_code != 200:
                    raise wire.error_of(_parse(await response.aread()), response.status_code)
                async for line in response.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    data = line[5:].strip()
                    if data == "[DONE]":
                        return
                    yield _parse(data)
        raise PlatformError(Code.UNAVAILABLE, "vLLM's stream broke off", retry_after_s=1.0)

    async def load_adapter(self, name: str, path: str) -> None:
        """Has vLLM load an adapter from a folder that it sees. Raises INVALID_ARGUMENT for what it does not take."""
        timeout = httpx.Timeout(_LOAD_S, connect=_CONNECT_S)
        body = {"lora_name": name, "lora_path": path}
        with _translated():
            response = await self._http.post("/v1/load_lora_adapter", json=body, timeout=timeout)
        if response.status_code == 200:
            return
        await self.check_health()  # vLLM says 500 of an adapter that it cannot apply, too: is it vLLM, or the adapter?
        why = wire.error_of(_parse(response.content), response.status_code).message
        message = f"adapter {name!r} cannot be loaded: {why}"
        raise PlatformError(Code.INVALID_ARGUMENT, message, reason="adapter_unsupported")

    async def unload_adapter(self, name: str) -> None:
        """Has vLLM forget an adapter; one that it does not know is fine."""
        with _translated():
            response = await self._http.post("/v1/unload_lora_adapter", json={"lora_name": name})
        if response.status_code not in (200, 404):
            raise wire.error_of(_parse(response.content), response.status_code)

    async def close(self) -> None:
        """Closes what is open."""
        await self._http.aclose()

    async def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = _CALL_S
    ) -> dict[str, Any]:
        timeout = httpx.Timeout(timeout_s, connect=_CONNECT_S)
        with _translated():
            response = await self._http.request(method, path, json=body, timeout=timeout)
        if response.status_code != 200:
            raise wire.error_of(_parse(response.content), response.status_code)
        return (
            _parse(response.content) if response.headers.get("content-type", "").startswith("application/json") else {}
        )


def _parse(data: str | bytes) -> dict[str, Any]:
    if len(data) > _MAX_LINE_BYTES:
        raise wire.broken(f"a message of {len(data)} bytes")
    try:
        message = json.loads(data)
    except ValueError:
        message = {"error": {"message": data[:500].decode(errors="replace") if isinstance(data, bytes) else data[:500]}}
    return message if isinstance(message, dict) else {"data": message}


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """httpx's errors as ours: whatever keeps vLLM from answering is UNAVAILABLE."""
    try:
        yield
    except httpx.HTTPError as error:
        what = str(error) or type(error).__name__
        raise PlatformError(Code.UNAVAILABLE, f"vLLM does not answer: {what}", retry_after_s=1.0) from error
