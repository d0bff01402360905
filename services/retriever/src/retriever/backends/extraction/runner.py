"""Runs the readers: small plain files in a thread, PDF and everything large in a child process with hard limits."""

import asyncio
import json
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

from chassis.errors import Code, PlatformError
from retriever.backends.extraction.readers import read
from retriever.core.extraction import Extracted, Extraction, Kind, Limits, refused

# A child takes about 0.3 s to start. Below this size the slowest Markdown there is (one bracket after another, where
# the parser's time grows with the square) takes about as long: 65,000 brackets took 3 to 4 s.
_IN_PROCESS_BYTES = 16 * 1024


class BoundedExtractor:
    """Reads files within limits of time and memory; a file that exceeds them is refused and the worker lives."""

    def __init__(self, limits: Limits, *, timeout_s: float, max_memory_bytes: int) -> None:
        self._limits = limits
        self._timeout_s = timeout_s
        self._max_memory_bytes = max_memory_bytes
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="extract")

    async def extract(self, kind: Kind, data: bytes) -> Extraction:
        """Reads a file; raises INVALID_ARGUMENT with the reason where it cannot be read."""
        if kind is not Kind.PDF and len(data) <= _IN_PROCESS_BYTES:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, read, kind, data, self._limits)
        return await asyncio.to_thread(_parsed, await self._run_child(kind, data))

    async def _run_child(self, kind: Kind, data: bytes) -> bytes:
        bounds = (self._limits.max_chars, self._limits.max_pages, self._limits.max_documents)
        numbers = (self._max_memory_bytes, int(self._timeout_s), *bounds)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "retriever.backends.extraction.child",
            kind.value,
            *(str(number) for number in numbers),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                output, errors = await process.communicate(data)
        except TimeoutError:
            raise refused(f"file: reading it took longer than {self._timeout_s:.0f} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return _output_of(process.returncode, output, errors)

    async def close(self) -> None:
        """Ends the thread."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _parsed(output: bytes) -> Extraction:
    result = json.loads(output)
    if "error" in result:
        raise refused(result["error"], result["param"])
    return Extraction([Extracted(**fields) for fields in result["documents"]], result["num_skipped"])


def _output_of(status: int | None, output: bytes, errors: bytes) -> bytes:
    """Tells what a child's end means: an answer, a file that broke it, or somebody who stopped it."""
    if status == 0:
        return output
    if status == -signal.SIGXCPU:
        raise refused("file: reading it takes more time than allowed")
    if b"MemoryError" in errors:
        raise refused("file: reading it takes more memory than allowed")
    if status in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS):
        raise refused("file: its reader crashed on it")
    if status is not None and status < 0:  # killed from outside: the file is not at fault
        raise PlatformError(Code.UNAVAILABLE, f"the reader of files was stopped by signal {-status}")
    last = errors.decode(errors="replace").strip().rsplit("\n", 1)[-1][:200]
    raise PlatformError(Code.INTERNAL, f"the reader of files ended with {status}: {last}")
