"""Compiles grammars for the event loop: on threads of its own, never more than they can do in time."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from chassis.errors import Code, PlatformError
from generator.core.grammar import CompiledGrammar, Grammar, GrammarCompiler

_MAX_IN_FLIGHT = 64


class GrammarDesk:
    """A compiler behind a bounded queue, which it closes too. Close it when the servers have stopped."""

    def __init__(self, compiler: GrammarCompiler, *, timeout_s: float, num_threads: int) -> None:
        """`timeout_s` is the longest time that a request waits, for those before it and for its own grammar."""
        self._compiler = compiler
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="grammar")
        self._num_in_flight = 0

    async def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Raises PlatformError: INVALID_ARGUMENT for what cannot be compiled, OVERLOADED where too many wait."""
        if self._num_in_flight >= _MAX_IN_FLIGHT:
            raise _busy()
        self._num_in_flight += 1
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.wrap_future(self._threads.submit(self._compiler.compile, grammar))
        except TimeoutError:
            raise _busy() from None
        finally:
            self._num_in_flight -= 1

    async def close(self) -> None:
        """Waits for what is being compiled: no longer than the compiler's own budget."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        await asyncio.to_thread(self._compiler.close)


def _busy() -> PlatformError:
    message = "too many grammars are being compiled: try again"
    return PlatformError(Code.OVERLOADED, message, reason="overloaded", retry_after_s=1.0)
