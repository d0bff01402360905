"""Grammars on the vocabulary of bytes: every kind, every refusal, what explodes, and the engine that keeps to them."""

import asyncio
import json
import random
import re
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest
from engine_suite import GREEDY, ask, collect
from llguidance import LLMatcher

from chassis.errors import Code, PlatformError
from generator.api.grammars import GrammarDesk
from generator.backends.grammar_trial import TrialFailed, TrialProcess
from generator.backends.llguidance_grammar import LlguidanceCompiler, LlguidanceGrammar, byte_tokenizer
from generator.backends.toy import EOS, ByteTokenizer, ToyRunner
from generator.core.batching import BatchingEngine
from generator.core.blocks import BlockManager
from generator.core.events import FinishReason
from generator.core.grammar import CompiledGrammar, Grammar
from generator.core.requests import GenerationRequest, SamplingParams, StopParams
from generator.core.scheduler import SchedulerLimits
from generator.core.tool_calls import tool_grammar

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
UNIQUE = {"type": "array", "uniqueItems": True}
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 5}}, "required": ["city"]}


def _tool(name: str, parameters: object = None, **function: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **function}}


TOOLS = json.dumps(
    [_tool("weather", CITY | {"additionalProperties": False}), {"type": "function", "function": {"name": "now"}}]
)


@pytest.fixture(scope="module")
def compiler() -> Iterator[LlguidanceCompiler]:
    compiler = LlguidanceCompiler(byte_tokenizer(), timeout_s=10.0, max_cached=8, num_workers=1)
    compiler.start()
    yield compiler
    compiler.close()


@pytest.fixture
async def engine(compiler: LlguidanceCompiler) -> AsyncIterator[BatchingEngine]:
    runner = ToyRunner(400, 4, 256)
    engine = BatchingEngine(runner, ByteTokenizer(), BlockManager(400, 4), SchedulerLimits(), grammars=compiler)
    engine.start()
    yield engine
    await engine.close()


def _walk(grammar: LlguidanceGrammar, seed: int, most: int = 400) -> str:
    """Picks among the allowed bytes at random, and the end as soon as it may once the text got long."""
    rng, matcher, text = random.Random(seed), grammar.matcher(), b""
    while not matcher.is_done and len(text) < most:
        allowed = [int(t) for t in np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little"))]
        token = EOS if EOS in allowed and (len(text) > 40 or rng.random() < 0.2) else rng.choice(allowed)
        if token == EOS:
            return text.decode()
        matcher.accept(token)
        text += bytes([token])
    return text.decode(errors="replace")


def _request(compiled: CompiledGrammar, kind: str = "regex", most: int = 60, **fields: object) -> GenerationRequest:
    stop = fields.pop("stop", StopParams(max_tokens=most))
    return ask(grammar=Grammar(kind), compiled=compiled, stop=stop, **fields)


@pytest.mark.parametrize(
    ("kind", "source", "pattern"),
    [
        ("regex", r"\d{3}-[a-f]{2,4}", r"\d{3}-[a-f]{2,4}"),
        ("regex", "(left|right)+!", "(left|right)+!"),
        ("choice", '["press", "presses", "ink\\n\\"", "é"]', 'press|presses|ink\n"|é'),
        ("ebnf", 'start: greeting " " /[A-Z][a-z]{2}/\ngreeting: "hi" | "yo"', "(hi|yo) [A-Z][a-z]{2}"),
        ("ebnf", 'root ::= "yes" | "no" [0-9]+', "yes|no[0-9]+"),
        ("json_schema", '{"enum": [1, "a"]}', '1|"a"'),
    ],
)
def test_every_text_matches_its_grammar(compiler: LlguidanceCompiler, kind: str, source: str, pattern: str) -> None:
    grammar = compiler.compile(Grammar(kind, source))
    for seed in range(20):
        text = _walk(grammar, seed)
        assert re.fullmatch(pattern, text), text


def test_json_mode_writes_no_more_whitespace_than_an_indentation(compiler: LlguidanceCompiler) -> None:
    matcher = compiler.compile(Grammar("json_object")).matcher()
    for byte in b"{\n" + b" " * 24:
        assert matcher.mask()[byte // 32] >> byte % 32 & 1
        matcher.accept(byte)
    for byte in b" \n\t":
        assert not matcher.mask()[byte // 32] >> byte % 32 & 1


@pytest.mark.parametrize(("is_required", "is_parallel"), [(True, True), (True, False), (False, True), (False, False)])
def test_tool_calls_are_of_the_tools_and_their_schemas(
    compiler: LlguidanceCompiler, is_required: bool, is_parallel: bool
) -> None:
    grammar = compiler.compile(tool_grammar(TOOLS, is_required, is_parallel))
    one = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    two = f'{one}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>'
    cases = {
        one: True,
        two: is_parallel,
        "No tool is needed.": not is_required,
        f"Let me look. {one}": not is_required,
        "<tool_call>": False,
        one.replace("weather", "rain"): False,
        one.replace("Paris", "Pariss"): False,
        one.replace('"Paris"', "7"): False,
    }
    for text, is_allowed in cases.items():
        matcher, taken = grammar.matcher(), 0
        for byte in text.encode():
            if not matcher.mask()[byte // 32] >> byte % 32 & 1:
                break
            matcher.accept(byte)
            taken += 1
        is_whole = taken == len(text.encode()) and bool(matcher.mask()[EOS // 32] >> EOS % 32 & 1)
        assert is_whole is is_allowed, (text, taken)


@pytest.mark.parametrize(
    ("kind", "source", "said"),
    [
        ("json_schema", "{", "not valid JSON"),
        ("json_schema", "[" * 100_000, "not valid JSON"),
        ("json_schema", "3", "must be an object"),
        ("json_schema", '{"type": "strin"}', "Invalid type: strin"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"$ref": "#"}', "no text can match"),
        ("json_schema", '{"$ref": "https://example.com/a"}', "example.com"),
        ("regex", "(", "unclosed"),
        ("regex", "a(?=b)", "look-ahead"),
        ("choice", "[]", "at least one string"),
        ("choice", "[1]", "at least one string"),
        ("ebnf", "start: nowhere", "nowhere"),
        ("ebnf", 'root ::= "a" | rest', "rest"),
        ("ebnf", "root ::= " + "(" * 3000 + '"a"' + ")" * 3000, "recursion"),
        ("poem", "", "no kind of grammar"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_what_is_wrong(
    compiler: LlguidanceCompiler, kind: str, source: str, said: str
) -> None:
    with pytest.raises(PlatformError) as raised:
        compiler.compile(Grammar(kind, source))
    assert (raised.value.code, raised.value.param) == (Code.INVALID_ARGUMENT, "grammar")
    assert raised.value.reason == "invalid_grammar" and said in raised.value.message
    assert len(raised.value.message) < 400


@pytest.mark.parametrize(
    ("tools", "param", "said"),
    [
        ([_tool("a"), _tool("b", {"properties": {"x": {"type": "strin"}}})], "tools[1].function.parameters", "strin"),
        ([_tool("a", {"type": "array"})], "tools[0].function.parameters", 'type "object"'),
        ([_tool("a", 3)], "tools[0].function.parameters", 'type "object"'),
        ([_tool("a", {"properties": {"x": UNIQUE}}, strict=True)], "tools[0].function.parameters", "uniqueItems"),
        ([_tool("a b")], "tools[0].function.name", "must match"),
        ([{"type": "function"}], "tools[0]", "function"),
        ([], "tools", "empty"),
    ],
)  # fmt: skip
def test_a_bad_tool_is_named(compiler: LlguidanceCompiler, tools: list[object], param: str, said: str) -> None:
    with pytest.raises(PlatformError) as raised:
        compiler.compile(tool_grammar(json.dumps(tools), True, True))
    assert (raised.value.code, raised.value.param) == (Code.INVALID_ARGUMENT, param)
    assert said in raised.value.message


def test_a_tool_that_is_not_strict_may_say_what_cannot_be_enforced(compiler: LlguidanceCompiler) -> None:
    loose = {"type": "object", "properties": {"x": UNIQUE}}
    compiler.compile(tool_grammar(json.dumps([_tool("a", loose)]), True, True))


def _chain(links: int) -> str:
    defs = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(links)} | {f"a{links}": {"type": "integer"}}
    return json.dumps({"$ref": "#/$defs/a0", "$defs": defs})


def _doubling(name: str, times: int) -> str:
    lines = (f"{name}{n}: {name}{n + 1} {name}{n + 1}" for n in range(times))
    return "\n".join([*lines, f'{name}{times}: "x"'])


BOMBS = {
    "references_too_deep": ("json_schema", _chain(2500)),
    "rules_too_deep": ("ebnf", "start: r0\n" + "\n".join(f'r{n}: "a" r{n + 1}' for n in range(6000)) + '\nr6000: "x"'),
    "pairs_of_patterns": (
        "json_schema",
        json.dumps({"patternProperties": {f"^{a}{b}": {} for a in _LETTERS[:20] for b in _LETTERS[:20]}}),
    ),
    "product_of_alternatives": (
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"properties": {f"p{i}_{j}": {}}} for j in range(6)]} for i in range(12)]}),
    ),
    "doubling_terminals": ("ebnf", f"start: T0\n{_doubling('T', 30)}"),
    "doubling_rules": ("ebnf", f"start: r0\n{_doubling('r', 40)}"),
    "nested_repeats": ("regex", "((a{1000}){1000}){1000}"),
    "too_many_bytes": ("json_schema", json.dumps({"enum": [f"value {n}" for n in range(20_000)]})),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_explodes_is_an_error_in_time_and_the_next_grammar_compiles(bomb: str) -> None:
    compiler = LlguidanceCompiler(byte_tokenizer(), timeout_s=0.5, max_cached=8, num_workers=1)
    compiler.start()
    began_s = time.monotonic()
    with pytest.raises(PlatformError) as raised:
        compiler.compile(Grammar(*BOMBS[bomb]))
    took_s = time.monotonic() - began_s
    assert raised.value.code is Code.INVALID_ARGUMENT and raised.value.param == "grammar"
    assert took_s < 10.0, took_s  # within one on a machine that does nothing else
    compiler._timeout_s = 10.0  # the next one is about being served, not about time
    assert _walk(compiler.compile(Grammar("regex", "ok")), 1) == "ok"
    compiler.close()


def test_the_interpreter_is_free_while_a_grammar_compiles(compiler: LlguidanceCompiler) -> None:
    schema = {"patternProperties": {f"^{a}{b}": {} for a in _LETTERS[:12] for b in _LETTERS[:20]}}
    source = LLMatcher.grammar_from_json_schema(schema)
    thread = threading.Thread(target=compiler._build, args=(source,))
    began_s = last_s = time.monotonic()
    worst_s = 0.0
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        now_s = time.monotonic()
        worst_s, last_s = max(worst_s, now_s - last_s), now_s
    assert worst_s < (last_s - began_s) / 2


def test_a_compiled_grammar_is_kept_and_the_oldest_is_dropped(compiler: LlguidanceCompiler) -> None:
    first = compiler.compile(Grammar("regex", "kept"))
    assert compiler.compile(Grammar("regex", "kept")) is first
    for number in range(8):
        compiler.compile(Grammar("regex", f"other{number}"))
    assert compiler.compile(Grammar("regex", "kept")) is not first
    assert len(compiler._cache) == 8


def test_a_trial_whose_process_was_killed_gets_a_new_one() -> None:
    trial = TrialProcess()
    request = {"source": '{"grammars":[{"lark_grammar":"start: /a/"}]}', "is_gbnf": False, "limits": {}, "limit_s": 60}
    assert trial.ask(request, 10.0)["error"] == ""
    assert trial._process is not None
    trial._process.send_signal(signal.SIGKILL)
    trial._process.wait()
    assert trial.ask(request, 10.0)["error"] == ""
    trial._process.send_signal(signal.SIGSTOP)
    with pytest.raises(TrialFailed, match="longer than"):
        trial.ask(request, 0.2)
    assert trial.ask(request, 10.0)["error"] == ""
    trial.stop()


class _Stuck:
    """A compiler that waits until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        self.go.wait(30)
        raise PlatformError(Code.INVALID_ARGUMENT, "no")

    def close(self) -> None:
        self.go.set()


async def test_the_desk_refuses_what_would_wait_too_long() -> None:
    compiler = _Stuck()
    desk = GrammarDesk(compiler, timeout_s=0.1, num_threads=1)
    results = await asyncio.gather(*(desk.compile(Grammar("regex", "a")) for _ in range(70)), return_exceptions=True)
    assert {error.code for error in results if isinstance(error, PlatformError)} == {Code.OVERLOADED}
    compiler.go.set()
    with pytest.raises(PlatformError, match="no"):
        await GrammarDesk(compiler, timeout_s=30, num_threads=1).compile(Grammar("regex", "a"))
    await desk.close()


# The engine.


async def test_output_keeps_to_the_grammar_and_ends_with_it(
    engine: BatchingEngine, compiler: LlguidanceCompiler
) -> None:
    compiled = compiler.compile(Grammar("regex", r"\d{3}-[a-f]{4}"))
    for sampling in (GREEDY, SamplingParams(temperature=1.5, seed=1)):
        got = await collect(engine, _request(compiled, sampling=sampling))
        assert re.fullmatch(r"\d{3}-[a-f]{4}", got.texts[0])
        assert got.reasons[0] is FinishReason.STOP and len(got.tokens[0]) == 8
        assert got.summary is not None and got.summary.num_completion == 8  # no step for an end token
    assert engine.stats().blocks_used == 0


async def test_each_of_n_completions_has_a_matcher_of_its_own(
    engine: BatchingEngine, compiler: LlguidanceCompiler
) -> None:
    compiled = compiler.compile(Grammar("regex", "[ab]{10}"))
    got = await collect(engine, _request(compiled, n=4, sampling=SamplingParams(temperature=2.0, seed=5)))
    assert all(re.fullmatch("[ab]{10}", text) for text in got.texts.values())
    assert len(set(got.texts.values())) > 1


async def test_what_max_tokens_cuts_ends_with_length(engine: BatchingEngine, compiler: LlguidanceCompiler) -> None:
    compiled = compiler.compile(Grammar("regex", "a{50}"))
    got = await collect(engine, _request(compiled, most=10))
    assert got.texts[0] == "a" * 10 and got.reasons[0] is FinishReason.LENGTH


async def test_a_grammar_ends_where_the_request_would_ignore_the_end(
    engine: BatchingEngine, compiler: LlguidanceCompiler
) -> None:
    compiled = compiler.compile(Grammar("choice", '["a", "ab"]'))
    stop = StopParams(max_tokens=20, min_tokens=10, ignore_eos=True)
    got = await collect(engine, _request(compiled, stop=stop))
    assert got.texts[0] in ("a", "ab") and got.reasons[0] is FinishReason.STOP


async def test_a_bias_cannot_leave_the_grammar(engine: BatchingEngine, compiler: LlguidanceCompiler) -> None:
    compiled = compiler.compile(Grammar("regex", "[xyz]{5}"))
    bias = SamplingParams(temperature=0.0, logit_bias={ord("a"): 100.0, ord("x"): -100.0})
    assert re.fullmatch("[yz]{5}", (await collect(engine, _request(compiled, sampling=bias))).texts[0])


async def test_a_grammar_that_is_too_slow_ends_its_own_request_alone(
    engine: BatchingEngine, compiler: LlguidanceCompiler
) -> None:
    compiled = compiler.compile(Grammar("regex", "a{50}"))
    slow = LlguidanceGrammar(compiled._matcher, 9, [EOS], allowed_s=-1.0)
    other = asyncio.create_task(collect(engine, ask(most=60)))
    with pytest.raises(PlatformError, match="masks take too long") as raised:
        await collect(engine, _request(slow))
    assert (raised.value.code, raised.value.reason) == (Code.INVALID_ARGUMENT, "grammar_too_complex")
    assert len((await other).tokens[0]) == 60
    assert engine.stats().blocks_used == 0


async def test_a_preempted_completion_goes_on_in_its_grammar(compiler: LlguidanceCompiler) -> None:
    tight = BatchingEngine(
        ToyRunner(65, 4, 256), ByteTokenizer(), BlockManager(65, 4), SchedulerLimits(), grammars=compiler
    )
    tight.start()
    compiled = compiler.compile(Grammar("regex", "([a-m]{4}-){20}"))
    got = await asyncio.gather(*(collect(tight, _request(compiled, most=200)) for _ in range(5)))
    assert all(re.fullmatch("([a-m]{4}-){20}", one.texts[0]) for one in got)
    assert tight.stats().preemptions_total > 0
    await tight.close()
