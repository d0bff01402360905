"""A trial of grammars in a process of their own, which may hang, run out of memory or overflow its stack.

A grammar comes from a client, and the library that compiles it recurses as deep as references go and works as long as
pairs of patterns take. Here that ends a process that nobody misses: what passed the trial within the budget, on a
small stack, is safe to compile beside the engine. Run as a script, this file is the other side: it imports nothing
but the standard library and llguidance. Both sides speak lines of JSON.
"""

import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 30.0  # of a new process, on a machine whose cores are all busy
_CRASH_WAIT_S = 2.0  # a process whose pipe broke is about to have an exit status of its own
_STACK_BYTES = 1024 * 1024  # an eighth of what a thread has by default: whatever passes here has room there
_MEMORY_BYTES = 1024 * 1024 * 1024  # of address space
_MAX_LINE_BYTES = 4 * 1024 * 1024
_NUM_TRIAL_STEPS = 4
_NICENESS = 5


class TrialFailed(Exception):
    """The grammar did not pass; the message says why, in words for its author."""


class TrialProcess:
    """One process, started when it is needed and again when it died. For one thread at a time; all of it blocks."""

    def __init__(self, command: tuple[str, ...] = (sys.executable, "-I", str(Path(__file__)))) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process where none runs. Raises OSError or TimeoutError."""
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self._read_line(time.monotonic() + _START_TIMEOUT_S)

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Returns the answer. Raises TrialFailed where it kills the process or takes longer than the budget."""
        self.start()
        try:
            deadline_s = time.monotonic() + timeout_s
            self._write(json.dumps(request).encode() + b"\n", deadline_s)
            answer = json.loads(self._read_line(deadline_s))
            assert isinstance(answer, dict)
            return answer
        except TimeoutError:
            self.stop()
            raise TrialFailed(f"it takes longer than {timeout_s:.1f} s to compile") from None
        except (EOFError, OSError, ValueError):
            status = self.stop(_CRASH_WAIT_S)
            log.info("a grammar ended its trial's process", extra={"exit_status": status})
            raise TrialFailed("it is nested too deep or needs too much memory to compile") from None

    def stop(self, grace_s: float = 0.0) -> int | None:
        """Ends the process; returns its exit status, None where there was none."""
        process, self._process = self._process, None
        if process is None:
            return None
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        process.stdout.close()
        return process.wait()

    def _write(self, data: bytes, deadline_s: float) -> None:
        assert self._process is not None and self._process.stdin is not None
        pipe = self._process.stdin.fileno()
        while data:
            self._wait(pipe, select.POLLOUT, deadline_s)
            data = data[os.write(pipe, data) :]

    def _read_line(self, deadline_s: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        line = b""
        while not line.endswith(b"\n"):
            self._wait(pipe, select.POLLIN, deadline_s)
            piece = os.read(pipe, 65536)
            if not piece or len(line) > _MAX_LINE_BYTES:
                raise EOFError("the process ended")
            line += piece
        return line

    def _wait(self, pipe: int, event: int, deadline_s: float) -> None:
        poll = select.poll()
        poll.register(pipe, event)
        if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
            raise TimeoutError


# The other side.


class ByteTokenizer:
    """A vocabulary of the 256 bytes: what a grammar does with it costs what it would cost with a model's, or less."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<eos>")
    special_token_ids = (256,)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def _try(request: dict[str, Any], tokenizer: Any) -> dict[str, str]:
    import llguidance

    source: str = request["source"]
    if request["is_gbnf"]:
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            source = llguidance.LLMatcher.grammar_from_lark(gbnf_to_lark(source))
        except Exception as error:  # whatever its hand-written parser stumbles over
            return {"error": str(error) or repr(error)}
    limits = llguidance.LLParserLimits(**request["limits"])
    matcher = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=limits)
    for _ in range(_NUM_TRIAL_STEPS):
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            return {"error": matcher.get_error()}
        allowed = [byte for byte in range(256) if mask[byte // 8] >> byte % 8 & 1]
        if not allowed:
            break
        matcher.consume_token(allowed[len(allowed) // 2])
    return {"error": matcher.get_error(), "source": source}


def _serve() -> None:
    from llguidance import LLTokenizer, TokenizerWrapper

    tokenizer = LLTokenizer(TokenizerWrapper(ByteTokenizer()))
    print("{}", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["limit_s"])  # for the case that nobody is left to kill us
        answer = _try(request, tokenizer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), flush=True)


def _main() -> None:
    os.nice(_NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    threading.stack_size(_STACK_BYTES)
    server = threading.Thread(target=_serve, daemon=True)
    server.start()
    server.join()


if __name__ == "__main__":
    _main()
