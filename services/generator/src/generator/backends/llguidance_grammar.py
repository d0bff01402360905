"""Grammars on llguidance: JSON, JSON Schema, regular expressions, choices, Lark and GBNF, tool calls.

Masks are computed on a model's own vocabulary, from its tokenizer.json; no torch, no transformers. A grammar is tried
in a process of its own first (grammar_trial), then compiled here and kept for the next request that asks for it.
"""

import hashlib
import json
import queue
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from chassis.errors import Code, PlatformError
from generator.backends import grammar_trial
from generator.backends.grammar_trial import TrialFailed, TrialProcess
from generator.core import tool_calls
from generator.core.grammar import MAX_SOURCE_CHARS, Grammar
from generator.core.requests import ModelSpec

MAX_MESSAGE_CHARS = 300
# JSON between tokens of its own: a space, or a new line with its indentation. More would let a weak model write
# whitespace until its tokens run out.
_JSON_OPTIONS: dict[str, Any] = {"whitespace_pattern": r"( |\n {0,24})", "whitespace_flexible": True}
# Far above what honest schemas need (5,000 properties), and low enough that no step takes longer than some 15 ms.
_LIMITS: dict[str, Any] = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 25_000,
    "max_lexer_states": 20_000,  # of 1 to 2 kB, for each completion
    "max_grammar_size": 250_000,
    "verbose_errors": False,
}
_ALLOWED_S, _ALLOWED_PER_TOKEN_S = 0.5, 0.002


def load_tokenizer(model_dir: Path, model: ModelSpec) -> llguidance.LLTokenizer:
    """Reads a model's vocabulary. Blocks for a fraction of a second."""
    text = (model_dir / "tokenizer.json").read_text()
    return llguidance.LLTokenizer(text, n_vocab=model.vocab_size, eos_token=sorted(model.eos_token_ids))


def byte_tokenizer() -> llguidance.LLTokenizer:
    """Makes the vocabulary of an engine whose tokens are the 256 bytes, and an end."""
    wrapped = llguidance.TokenizerWrapper(grammar_trial.ByteTokenizer())
    return llguidance.LLTokenizer(wrapped)


class LlguidanceCompiler:
    """See core.grammar.GrammarCompiler. Close it: it has up to `num_workers` processes."""

    def __init__(
        self, tokenizer: llguidance.LLTokenizer, *, timeout_s: float, max_cached: int, num_workers: int = 2
    ) -> None:
        self._tokenizer = tokenizer
        self._timeout_s = timeout_s
        self._max_cached = max_cached
        self._cache: OrderedDict[bytes, LlguidanceGrammar] = OrderedDict()
        self._lock = threading.Lock()
        self._workers = [TrialProcess() for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[TrialProcess] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def start(self) -> None:
        """Starts the processes, so that the first grammar does not wait for one."""
        for worker in self._workers:
            worker.start()

    def close(self) -> None:
        """Ends the processes. Nothing may be compiled any more."""
        for worker in self._workers:
            worker.stop()

    def compile(self, grammar: Grammar) -> "LlguidanceGrammar":
        """See GrammarCompiler.compile. OVERLOADED where all processes are busy for longer than the budget."""
        key = hashlib.sha256(f"{grammar.kind}\0{grammar.source}".encode()).digest()
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        num_chars = len(grammar.source)
        if num_chars > MAX_SOURCE_CHARS:
            message = f"it has {num_chars} characters, of at most {MAX_SOURCE_CHARS}"
            raise refusal(message, "grammar", "grammar_too_complex")
        compiled = self._compile(grammar, time.monotonic() + self._timeout_s)
        with self._lock:
            self._cache[key] = compiled
            while len(self._cache) > self._max_cached:
                self._cache.popitem(last=False)
        return compiled

    def _compile(self, grammar: Grammar, deadline_s: float) -> "LlguidanceGrammar":
        source = _translate(grammar)
        try:
            worker = self._idle.get(timeout=max(0.0, deadline_s - time.monotonic()))
        except queue.Empty:
            message = "all that compile grammars are busy: try again"
            raise PlatformError(Code.OVERLOADED, message, reason="overloaded", retry_after_s=1.0) from None
        try:
            source = self._tried(worker, grammar, source, deadline_s)
        finally:
            self._idle.put(worker)
        return self._build(source)

    def _tried(self, worker: TrialProcess, grammar: Grammar, source: str, deadline_s: float) -> str:
        """Returns the source as it passed the trial."""
        worker.start()
        is_gbnf = grammar.kind == "ebnf" and "::=" in source
        error, passed = self._try(worker, source, is_gbnf, max(0.1, deadline_s - time.monotonic()))
        if not error:
            return passed
        param = "grammar"
        if grammar.kind == tool_calls.KIND:  # which of its schemas is it?
            param, schemas = "tools", tool_calls.schemas_of(grammar)
            for name, schema, is_strict in schemas:
                alone = _from_schema(dict(schema), is_lenient=not is_strict)
                alone_error, _ = self._try(worker, alone, False, self._timeout_s / len(schemas))
                if alone_error:
                    error, param = alone_error, name
                    break
        raise refusal(error, param, "invalid_grammar")

    def _try(self, worker: TrialProcess, source: str, is_gbnf: bool, timeout_s: float) -> tuple[str, str]:
        """Returns what is wrong with a source, "" for nothing, and the source in llguidance's own form."""
        request = {"source": source, "is_gbnf": is_gbnf, "limits": _LIMITS, "limit_s": 2 * timeout_s}
        try:
            answer = worker.ask(request, timeout_s)
        except TrialFailed as error:
            return str(error), ""
        return answer["error"], answer.get("source", "")

    def _build(self, source: str) -> "LlguidanceGrammar":
        limits = llguidance.LLParserLimits(**_LIMITS)
        matcher = llguidance.LLMatcher(self._tokenizer, source, log_level=0, limits=limits)
        compiled = LlguidanceGrammar(matcher, -(-self._tokenizer.vocab_size // 32), self._tokenizer.eos_tokens)
        if not matcher.is_error():
            # The first mask sets up what is lazy, here and not on the engine's thread.
            first = matcher.deep_copy()
            first.compute_bitmask()
            matcher = first
        if matcher.is_error():
            raise refusal(matcher.get_error(), "grammar", "grammar_too_complex")
        return compiled


class LlguidanceGrammar:
    """See core.grammar.CompiledGrammar. Thread-safe."""

    def __init__(
        self, matcher: llguidance.LLMatcher, num_words: int, end_ids: list[int], allowed_s: float = _ALLOWED_S
    ) -> None:
        """`allowed_s` is time of the engine that a completion may take beyond that for each token."""
        self._matcher = matcher
        self._num_words = num_words
        self._end_ids = end_ids
        self._allowed_s = allowed_s

    def matcher(self) -> "LlguidanceMatcher":
        """See CompiledGrammar.matcher."""
        return LlguidanceMatcher(self._matcher.deep_copy(), self._num_words, self._end_ids, self._allowed_s)


class LlguidanceMatcher:
    """See core.grammar.TokenMatcher.

    Ends its own request where the grammar turns out too complex, or takes so much of the engine's time, mask after
    mask, that others would feel it: 2 ms for a token, in the mean.
    """

    def __init__(self, matcher: llguidance.LLMatcher, num_words: int, end_ids: list[int], allowed_s: float) -> None:
        self._matcher = matcher
        self._words = np.zeros(num_words, dtype=np.int32)
        self._end_ids = end_ids
        self._allowed_s = allowed_s
        self._is_failed = False

    @property
    def is_done(self) -> bool:
        """See TokenMatcher.is_done."""
        return not self._is_failed and self._matcher.is_stopped()

    def mask(self) -> NDArray[np.int32]:
        """See TokenMatcher.mask. The array is overwritten by the next call."""
        began_s = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        self._allowed_s += began_s - time.thread_time()
        if self._matcher.is_error() or self._allowed_s < 0 or not self._words.any():
            self._is_failed = not self.is_done
            self._words[:] = 0
            for token_id in self._end_ids:
                self._words[token_id // 32] |= np.uint32(1 << token_id % 32).view(np.int32)
        return self._words

    def accept(self, token_id: int) -> None:
        """See TokenMatcher.accept."""
        if not self._is_failed and (token_id in self._end_ids and self.is_done):
            return
        began_s = time.thread_time()
        is_taken = not self._is_failed and self._matcher.consume_token(token_id)
        self._allowed_s += _ALLOWED_PER_TOKEN_S + began_s - time.thread_time()
        if not is_taken:
            self._is_failed = True
            said = self._matcher.get_error() or "its masks take too long"
            message = f"it became too complex while the answer was written: {said}"
            raise refusal(message, "grammar", "grammar_too_complex")


def refusal(message: str, param: str, reason: str) -> PlatformError:
    """Makes the error for a grammar that cannot be had; the library's own words are cut to what helps its author."""
    said = " ".join(message.removesuffix("<non-verbose/>").split())[:MAX_MESSAGE_CHARS]
    if said.startswith("NoExtension"):
        said = "no text can match it"
    what = "the schema of this tool" if param != "grammar" else "the grammar"
    return PlatformError(Code.INVALID_ARGUMENT, f"{what} cannot be used: {said}", param=param, reason=reason)


def _translate(grammar: Grammar) -> str:
    """Returns a grammar in llguidance's form; GBNF stays as it is. Raises PlatformError(INVALID_ARGUMENT)."""
    match grammar.kind:
        case "json_object":
            return _from_schema({"type": "object"})
        case "json_schema":
            return _from_schema(_load("the JSON Schema", grammar.source, dict))
        case "regex":
            # Digits are ASCII's, as in JSON Schema: nobody who writes \d means those of forty scripts.
            ascii_digits = llguidance.regex_to_lark(grammar.source, "d")
            return llguidance.LLMatcher.grammar_from_lark(f"start: /{ascii_digits}/")
        case "choice":
            options = _load("the choice", grammar.source, list)
            if not options or not all(isinstance(option, str) for option in options):
                raise refusal("a choice needs at least one string", "grammar", "invalid_grammar")
            # A terminal, so that all options are one automaton.
            literals = " | ".join(json.dumps(option, ensure_ascii=False) for option in options)
            return llguidance.LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {literals}")
        case tool_calls.KIND:
            return llguidance.LLMatcher.grammar_from_lark(tool_calls.to_lark(grammar, _JSON_OPTIONS))
        case "ebnf" if "::=" in grammar.source:
            return grammar.source
        case "ebnf":
            return llguidance.LLMatcher.grammar_from_lark(grammar.source)
    raise refusal(f"{grammar.kind!r} is no kind of grammar", "grammar", "invalid_grammar")


def _from_schema(schema: dict[str, Any], is_lenient: bool = False) -> str:
    options: Any = {**_JSON_OPTIONS, "lenient": is_lenient}  # they win over those that the schema may hold
    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=options)


def _load(what: str, text: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refusal(f"{what} is not valid JSON: {error}", "grammar", "invalid_grammar") from None
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        raise refusal(f"{what} must be {wanted}, not {type(value).__name__}", "grammar", "invalid_grammar")
    return value
